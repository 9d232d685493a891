"""Kill a run in the middle, resume it, and get the bits of a run that nobody killed.

A checkpoint is written whole or not at all, so it does not matter when the kill comes. `luthier resume RUN` does the
same from the command line, and `luthier verify-resume SPEC` proves it on a run of yours.
"""

import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from luthier import RunSpec, resume, train

home = Path(tempfile.mkdtemp())
spec = RunSpec.from_plain(
    {
        "model": "sample:minilm-l6",
        "data": {"source": "sample:trec6"},
        "method": "bitfit",
        "steps": 30,
        "batch": {"size": 8},
        "eval": {"rows": 50},
        "checkpoint": {"every_steps": 5},
        "threads": 1,
        "out": str(home / "killed"),
    }
)
(home / "spec.toml").write_text(spec.to_toml(), encoding="utf-8")

# Another process trains, and is killed without a warning once it has written a checkpoint of some step.
command = [sys.executable, "-m", "luthier", "train", str(home / "spec.toml"), "--out", str(home / "killed")]
with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as other:
    while other.poll() is None and not list((home / "killed").glob("ckpt/*5")):
        time.sleep(0.01)
    other.kill()
print("killed" if other.returncode < 0 else f"it had ended before: {other.returncode}")

resumed = resume(home / "killed")
untouched = train(replace(spec, out=str(home / "untouched")))

bits = [(run.path / "tuning" / "tuning.safetensors").read_bytes() for run in (resumed, untouched)]
assert bits[0] == bits[1], "a resumed run must end where an untouched one ends"
print(f"resumed and untouched: the same {len(bits[0]):,} bytes; scores {resumed.scores == untouched.scores}")

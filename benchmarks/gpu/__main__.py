"""Check and measure on a GPU, in at most eight minutes and without the network.

    python -m benchmarks.gpu                  all parts; writes benchmarks/results/gpu/results.json, draws the page
    python -m benchmarks.gpu --tiny           every line of it at tiny sizes, on the CPU where there is no GPU
    python -m benchmarks.gpu --only contract  one kind of part: contract, resume or speed

Each part is a process of its own with a limit of its own: one that fails does not lose the others. The exit code is
0 where all was well, 1 where something was wrong, and 2 where nothing could be run.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import _machine
from benchmarks.gpu.part import CONTESTANTS, ROOT, absent, installed

__all__ = ["Part", "main", "planned"]

LIMIT = 8 * 60.0
SLOW = 8
"""how many times as long everything may take at tiny sizes: a processor that others use too is no fault"""
NEEDED = ("torch", "transformers", "safetensors", "numpy", "jinja2", "psutil", "tomli_w")
"""without these no part runs"""
RESUMED = ("lora", "adalora", "child_tuning_d", "prefix_tuning", "lst", "full")
APART = 0.02
"""how far the first losses of two sides may be apart, as a share: both start as the same base, in bf16"""


@dataclass(frozen=True)
class Part:
    """What one process does: a function of this folder, its arguments, and the seconds it may take."""

    kind: str
    name: str
    module: str
    function: str
    limit: float
    arguments: dict[str, Any] = field(default_factory=dict)


def planned(tiny: bool, device: str, methods: list[str] | None = None) -> list[Part]:
    """The parts in the order in which they are run: what is right comes before what is fast."""
    resumed = {"device": device, "methods": methods or list(RESUMED), "precisions": ["fp32", "bf16"]}
    parts = [
        Part("contract", "contract", "checks", "contract", 150.0, {"device": device, "methods": methods}),
        Part("resume", "resume", "checks", "resume", 90.0, resumed),
    ]
    sizes = [("tiny", 4, 32)] if tiny else [("1b", 8, 1024), ("8b", 4, 1024)]
    for size, batch, length in sizes:
        for turn in (1,) if tiny else (1, 2):
            parts += [
                Part(
                    "speed", f"{size}, {who}, {turn}", "speed", "steps", 110.0 if size == "8b" else 75.0,
                    {"who": who, "size": size, "device": device, "batch": batch, "length": length},
                )
                for who in CONTESTANTS
            ]  # fmt: skip
    # A second turn is the first to be left out where time is short.
    return sorted(parts, key=lambda part: part.name.endswith(", 2"))


def run(part: Part, left: float) -> dict[str, Any]:
    """One part; what it recorded, and `error` where it did not end well by itself."""
    print(f"{part.name} (at most {min(part.limit, left):.0f} s)", flush=True)
    started, error = time.monotonic(), ""
    with tempfile.TemporaryDirectory(prefix="luthier-gpu-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps({"module": part.module, "function": part.function, "arguments": part.arguments}))
        env = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-u", "-m", "benchmarks.gpu.part", str(job), str(result)]
        code = 0
        try:
            code = subprocess.run(command, cwd=ROOT, env=env, timeout=min(part.limit, left), check=False).returncode
        except subprocess.TimeoutExpired:
            error = f"not done after {min(part.limit, left):.0f} seconds"
        facts = json.loads(result.read_text()) if result.exists() else {}
    if not error and (code not in (0, 1) or not facts):
        error = f"the process ended with code {code}"
    if error:
        print(f"  {error}", flush=True)
    ok = not error and all(one.get("ok", True) for one in facts.values())
    seconds = round(time.monotonic() - started, 1)
    return {"kind": part.kind, "name": part.name, "ok": ok, "error": error, "seconds": seconds, "facts": facts}


def unequal(parts: list[dict[str, Any]]) -> list[str]:
    """Where two contestants start with other losses on the same rows: then their times are of other work."""
    first: dict[tuple[str, str], tuple[str, float]] = {}
    found = []
    for part in parts:
        for rows, facts in part["facts"].items() if part["kind"] == "speed" else ():
            if not facts.get("losses") or rows != "full rows":
                continue  # the padded rows come after some steps
            who, loss = part["name"], float(facts["losses"][0])
            other, wanted = first.setdefault((who.split(",")[0], rows), (who, loss))
            if abs(loss - wanted) > APART * abs(wanted):
                found.append(f"{who} starts at a loss of {loss:.4f}, {other} at {wanted:.4f}")
    return found


def main(words: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; on a CPU where there is no GPU")
    parser.add_argument("--only", action="append", choices=["contract", "resume", "speed"], help="may be repeated")
    parser.add_argument("--method", action="append", help="of the checks, only this method; may be repeated")
    parser.add_argument("--out", type=Path, help="folder for the results, in place of benchmarks/results/gpu")
    given = parser.parse_args(words)
    gone = [library for library in NEEDED if not installed(library)]
    if gone:
        print(
            f"nothing can be run: {', '.join(gone)} cannot be imported by {sys.executable}. Without a network, put "
            "wheels of them into a folder that PYTHONPATH names; with one, `make test` sets up .venv.",
            file=sys.stderr,
        )
        return 2
    import torch

    if not torch.cuda.is_available() and not given.tiny:
        print("there is no GPU that torch can use; `make gpu TINY=1` runs every line on the CPU.", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = {who: why for who in CONTESTANTS if (why := absent(who)) is not None}
    for who, why in missing.items():
        print(f"{who}: {why}", flush=True)
    slow = SLOW if given.tiny else 1
    began, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    done: list[dict[str, Any]] = []
    for part in planned(given.tiny, device, given.method):
        left = slow * LIMIT - (time.monotonic() - began)
        if (given.only and part.kind not in given.only) or part.arguments.get("who") in missing:
            continue
        if left < 15 and part.name.endswith(", 2"):
            print(f"{part.name}: left out, {left:.0f} seconds are left", flush=True)
            continue
        done.append(run(replace(part, limit=slow * part.limit), max(1.0, left)))
    odd = unequal(done)
    for line in odd:
        print(f"WRONG: {line}", flush=True)
    found = {
        "started": started,
        "seconds": round(time.monotonic() - began, 1),
        "tiny": given.tiny,
        "device": device,
        "environment": _machine.environment(None),
        "missing": missing,
        "unequal": odd,
        "parts": done,
    }
    folder = given.out or ROOT / ("build/gpu" if given.tiny else "benchmarks/results/gpu")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    wrong = [part["name"] for part in done if not part["ok"]]
    print(f"{len(done)} parts in {found['seconds']} seconds, wrong: {', '.join(wrong) or 'none'}", flush=True)
    print(f"written to {folder / 'results.json'}", flush=True)
    if not given.tiny and given.out is None:
        from benchmarks._page import draw

        print(draw(), flush=True)
    return int(bool(wrong or odd))


if __name__ == "__main__":
    raise SystemExit(main())

"""Peak memory and step time of full fine-tuning, by optimiser: `python benchmarks/full_memory.py [MODEL ...]`.

Each way trains the same rows in a process of its own, one after the other. A step's time is the median of those after
the first; the peak is of the steps alone, loading, saving and scores left out. Prints the rows of docs/memory.md.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from luthier.core import human_bytes
from luthier.runs import peak_bytes, reset_peak
from luthier.runs.spec import BatchSpec, DataSpec, EvalSpec, OptimSpec, RunSpec
from luthier.training import Listener
from luthier.workflow import train

WORK: dict[str, dict[str, Any]] = {
    "minilm-l6": {"model": "sample:minilm-l6", "data": "sample:trec6", "size": 64, "max_length": 64},
    "smollm2-135m": {"model": "sample:smollm2-135m", "data": "sample:chitchat", "size": 4, "max_length": 256},
}
WAYS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 1e-5},
    "adamw, checkpointing": {"name": "adamw", "lr": 1e-5, "checkpointing": True},
    "sgd": {"name": "sgd", "lr": 1e-3},
    "lomo, clip 1 (two passes)": {"name": "lomo", "lr": 1e-3},
    "lomo, clip 0 (one pass)": {"name": "lomo", "lr": 1e-3, "clip": 0.0},
    "lomo, clip 0, checkpointing": {"name": "lomo", "lr": 1e-3, "clip": 0.0, "checkpointing": True},
}
STEPS = 5


class Watch(Listener):
    """Times the steps, and the memory they need."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peaks: list[int] = []

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.times.append(time.perf_counter())
        self.peaks.append(peak_bytes())
        reset_peak()  # after the first step: what was held while loading and saving is left out


def child(work: str, way: str) -> None:
    """One run; its figures as JSON."""
    of, how = WORK[work], WAYS[way]
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        result = train(
            RunSpec(
                model=of["model"], data=DataSpec(source=of["data"]), method="full", steps=STEPS, threads=2,
                max_length=of["max_length"], batch=BatchSpec(size=of["size"], tokens=of["size"] * of["max_length"]),
                optim=OptimSpec(name=how["name"], lr=how["lr"], clip=how.get("clip", 1.0)),
                gradient_checkpointing=how.get("checkpointing", False), eval=EvalSpec(rows=4), out=f"{folder}/run",
            ),
            listener=watch,
        )  # fmt: skip
    seconds = [b - a for a, b in zip(watch.times, watch.times[1:], strict=False)]
    parts = {n: b for n, b in result.memory.items() if n not in ("other", "program")}
    print(json.dumps({"seconds": statistics.median(seconds), "peak": max(watch.peaks[1:]), "parts": parts}))


def main(names: list[str]) -> None:
    """Every way of every work."""
    for work in names or list(WORK):
        of = WORK[work]
        print(f"\n{work}, {of['size']} rows of at most {of['max_length']} tokens\n")
        print("| | peak of the steps | trained | kept values | gradients | moments | activations, logits | s a step |")
        print("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for way in WAYS:
            done = subprocess.run([sys.executable, __file__, "--child", work, way], capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            found = json.loads(done.stdout.splitlines()[-1])
            parts = found["parts"]
            cells = [
                human_bytes(n)
                for n in (
                    found["peak"], parts["trained"], parts["weights"], parts["gradients"], parts["optimiser"],
                    parts["activations"] + parts.get("logits", 0),
                )
            ]  # fmt: skip
            print(f"| {way} | {' | '.join(cells)} | {found['seconds']:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        main([Path(n).name for n in sys.argv[1:]])

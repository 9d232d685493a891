"""How long a resumed run takes to its first new step, by how far it had come.

    python benchmarks/resume_start.py      figures into docs/reliability.md

minilm-l6 + LoRA on trec6, batch 32, ten epochs; stopped after so many steps and resumed three times for a step each.
Nothing that was done before is done again: batches are a function of the step's number, and the log is cut where the
checkpoint says. What could grow is the log that is read.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _marks

from luthier.runs.spec import DataSpec, RunSpec
from luthier.training import Listener
from luthier.workflow import resume, train

AT = (10, 200, 800)
TIMES = 3


class First(Listener):
    """Notes when the first step was made."""

    def __init__(self) -> None:
        self.at: float | None = None

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.at = time.perf_counter() if self.at is None else self.at


def seconds(folder: Path, stop_at: int) -> float:
    first, start = First(), time.perf_counter()
    resume(folder, listener=first, stop_at=stop_at)
    assert first.at is not None, f"no step was made before {stop_at}"
    return first.at - start


def main() -> None:
    """Measure, print, and write to the page."""
    rows = ["| steps behind it | seconds to the first new step: median (least to most) |", "| --- | --- |"]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        data = DataSpec(source="sample:trec6")
        spec = RunSpec(model="sample:minilm-l6", data=data, method="lora", epochs=10.0, out=str(folder))
        train(spec, stop_at=2)
        for at in AT:
            resume(folder, stop_at=at)
            took = [seconds(folder, at + i + 1) for i in range(TIMES)]
            rows.append(f"| {at} | {statistics.median(took):.2f} ({min(took):.2f} to {max(took):.2f}) |")
            print(rows[-1], flush=True)
    _marks.write_block("resume_start", [*rows, "", "`python benchmarks/resume_start.py`"])


if __name__ == "__main__":
    main()

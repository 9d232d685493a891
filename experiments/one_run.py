"""One training run on given rows, and what it answered: shared by the experiments."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.cli._spec_options import overlay, settings_of
from luthier.runs.spec import RunSpec
from luthier.workflow import train

__all__ = ["one_run"]


def one_run(
    model: str,
    method: str,
    seed: int,
    train_rows: Path,
    test_rows: Path,
    out: str,
    given: Sequence[str] = (),
    sources: Sequence[str] = (),
    also: Sequence[str] = (),
) -> tuple[list[bool], dict[str, Any]]:
    """For each test row whether it was right, and facts of the run. `given`: fields as FIELD=VALUE, defaults else.

    `also`: further sets of rows as NAME=FILE. Of the facts, `held` counts weights, gradients, moments and activations.
    """
    pair = {"pair": "text_pair"} if "text_pair" in train_rows.read_text("utf-8").partition("\n")[0] else {}
    values: dict[str, Any] = {
        "model": model, "method": method, "seed": seed, "threads": 1, "out": out,
        "data": {"source": str(train_rows), "test": str(test_rows), "text": "text", "label": "label", **pair},
        **({"sources": list(sources)} if sources else {}),
        **({"also": list(also)} if also else {}),
    }  # fmt: skip
    begun = time.process_time()
    result = train(RunSpec.from_plain(overlay(values, settings_of(list(given)))), progress=False)
    cpu = time.process_time() - begun  # the wall's seconds tell as much of what else ran
    record = json.loads((result.path / "record.json").read_text("utf-8"))
    with (result.path / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (result.path / "events.jsonl").read_text("utf-8").splitlines()]
    return [row["wanted"] == row["answer"] for row in rows], {
        "steps": max((e["step"] for e in lines if e["event"] == "step"), default=0),
        "training_seconds": round(result.seconds, 1),
        "scores": {k: round(v, 4) for k, v in result.scores.items()},
        "trained": result.n_params,
        "stored": record["stored"],
        "held": sum(size for part, size in record["memory"].items() if part not in ("program", "other")),
        "cpu_seconds": round(cpu, 1),
        "answers": len({row["answer"] for row in rows}),
    }

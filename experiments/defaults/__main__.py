"""Run what is missing of the panel, then write the page. See the package for its options."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.defaults.baselines import BASELINES, MODEL, score
from experiments.defaults.page import write
from experiments.defaults.panel import PANEL, Member, halves

RESULTS = Path(__file__).parent / "results.jsonl"
METHODS = ("lora",)


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m experiments.defaults", description=__doc__)
    words.add_argument("--only", action="append", help="a set; may be repeated")
    words.add_argument("--method", action="append", help="a method in place of the usual ones; may be repeated")
    words.add_argument("--seeds", type=int, default=1, help="seeds of each method")
    words.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the run")
    words.add_argument("--state", default="now", help="how this state of the defaults is called in the results")
    words.add_argument("--results", type=Path, default=RESULTS)
    words.add_argument("--no-baselines", action="store_true")
    words.add_argument("--page", action="store_true", help="only write docs/defaults.md from what is here")
    asked = words.parse_args()
    if asked.page:
        write(asked.results)
        return
    members = [m for m in PANEL if not asked.only or m.name in asked.only]
    for member in members if not asked.no_baselines else ():
        for name in BASELINES:
            _once(asked.results, {"set": member.name, "what": name, "state": "", "seed": 0}, member, {})
    for seed in range(asked.seeds):
        for method in asked.method or METHODS:
            for member in members:
                which = {"set": member.name, "what": method, "state": asked.state, "seed": seed}
                _once(asked.results, which, member, dict(word.split("=", 1) for word in asked.set))
    write(asked.results)


def _once(results: Path, which: dict[str, Any], member: Member, given: dict[str, str]) -> None:
    """Make one result and append it, unless it is there."""
    known = [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []
    if any(all(row[k] == v for k, v in which.items()) for row in known):
        return
    train, test = halves(member)
    begun = time.monotonic()
    facts: dict[str, Any] = {}
    if which["what"] in BASELINES:
        right = score(which["what"], train, test)
    else:
        right, facts = _trained(which["what"], which["seed"], train, test, given)
    facts |= {"accuracy": round(float(np.mean(right)), 4), "rows": len(right)}
    facts["seconds"] = round(time.monotonic() - begun, 1)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(which | facts) + "\n")
    print(json.dumps(which | facts), flush=True)


def _trained(
    method: str, seed: int, train: Path, test: Path, given: dict[str, str]
) -> tuple[list[bool], dict[str, Any]]:
    import csv

    from luthier.cli._spec_options import overlay, settings_of
    from luthier.runs.spec import RunSpec
    from luthier.workflow import train as run

    pair = {"pair": "text_pair"} if "text_pair" in train.read_text("utf-8").partition("\n")[0] else {}
    with tempfile.TemporaryDirectory() as home:
        values: dict[str, Any] = {
            "model": MODEL, "method": method, "seed": seed, "threads": 1, "out": f"{home}/run",
            "data": {"source": str(train), "test": str(test), "text": "text", "label": "label", **pair},
        }  # fmt: skip
        spec = RunSpec.from_plain(overlay(values, settings_of([f"{k}={v}" for k, v in given.items()])))
        result = run(spec, progress=False)
        with (result.path / "predictions.csv").open(encoding="utf-8", newline="") as file:
            right = [row["wanted"] == row["answer"] for row in csv.DictReader(file)]
        lines = [json.loads(line) for line in (result.path / "events.jsonl").read_text("utf-8").splitlines()]
        steps = max((e["step"] for e in lines if e["event"] == "step"), default=0)
    scores = {k: round(v, 4) for k, v in result.scores.items()}
    return right, {"steps": steps, "training_seconds": round(result.seconds, 1), "scores": scores}


if __name__ == "__main__":
    main()

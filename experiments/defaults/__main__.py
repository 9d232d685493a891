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
from experiments.one_run import one_run

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
            _once(asked.results, {"set": member.name, "what": name, "state": "", "seed": 0}, member, [])
    for seed in range(asked.seeds):
        for method in asked.method or METHODS:
            for member in members:
                which = {"set": member.name, "what": method, "state": asked.state, "seed": seed}
                _once(asked.results, which, member, asked.set)
    write(asked.results)


def _once(results: Path, which: dict[str, Any], member: Member, given: list[str]) -> None:
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


def _trained(method: str, seed: int, train: Path, test: Path, given: list[str]) -> tuple[list[bool], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as home:
        return one_run(MODEL, method, seed, train, test, f"{home}/run", given)


if __name__ == "__main__":
    main()

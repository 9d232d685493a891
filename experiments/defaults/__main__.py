"""Run what is missing of the panel, then write the page. See the package for its options."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from experiments.defaults.baselines import BASELINES, MODEL, score
from experiments.defaults.page import write
from experiments.defaults.panel import PANEL, Member, halves
from experiments.one_run import one_run
from experiments.results import once, scored

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
            which = {"set": member.name, "what": name, "state": "", "seed": 0}
            once(asked.results, which, partial(_made, which, member, []))
    for seed in range(asked.seeds):
        for method in asked.method or METHODS:
            for member in members:
                which = {"set": member.name, "what": method, "state": asked.state, "seed": seed}
                once(asked.results, which, partial(_made, which, member, asked.set))
    write(asked.results)


def _made(which: dict[str, Any], member: Member, given: list[str]) -> dict[str, Any]:
    train, test = halves(member)
    if which["what"] in BASELINES:
        return scored(score(which["what"], train, test))
    with tempfile.TemporaryDirectory() as home:
        right, facts = one_run(MODEL, which["what"], which["seed"], train, test, f"{home}/run", given)
    return facts | scored(right)


if __name__ == "__main__":
    main()

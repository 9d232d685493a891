"""Train what is missing of the table, seed by seed, then write the page. See the package for its options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan_grid import of_part
from experiments.defaults.baselines import MODEL
from experiments.defaults.panel import PANEL, Member, halves
from experiments.methods.page import SETS, write
from experiments.one_run import one_run
from experiments.results import kept, once, tried, words_of
from luthier.samples.store import cache_dir
from luthier.surgery import METHODS
from luthier.surgery.compose import spelling

RESULTS = Path(__file__).parent / "results.jsonl"
BY_NAME = {member.name: member for member in PANEL}
SOURCE_SETS = ("sarcasm", "sms-spam")
"""What the sources of a method that needs some were trained on."""


def main() -> None:
    words = words_of("methods", "method", RESULTS, __doc__, METHODS.get)
    words.add_argument("--set", choices=SETS, default=SETS[0], help="the rows that are learnt")
    asked = words.parse_args()
    names = sorted(asked.only or METHODS.ours(), key=lambda name: name != "head_only")
    for seed in range(0 if asked.page else asked.seeds):
        for name in of_part(names, asked.part):
            which = {"set": asked.set, "method": name, "seed": seed}
            once(asked.results, which, partial(tried, partial(_run, asked.set, name, seed)))
    if asked.page or asked.results == RESULTS:  # results kept elsewhere are a trial, and no page of the docs
        write(asked.results)


def _run(rows: str, name: str, seed: int, out: str) -> tuple[list[bool], dict[str, Any]]:
    train, test = halves(BY_NAME[rows])
    return one_run(MODEL, spelling(name), seed, train, test, out, sources=sources_of(name))


def sources_of(name: str) -> list[str]:
    """Finished runs that a method is made of, where it cannot do without; trained once and kept."""
    cls = METHODS.get(name)
    if not cls.sources or not cls().least_sources:  # of madx, how many depends on its part
        return []
    return [_source(cls.sources[0], BY_NAME[member]) for member in SOURCE_SETS]


def _source(method: str, member: Member) -> str:
    train, test = halves(member)
    folder = cache_dir() / "panel" / "sources" / f"{method}-{member.name}"
    return kept(folder, lambda out: one_run(MODEL, method, 0, train, test, out, ["run.steps=200"]))


if __name__ == "__main__":
    main()

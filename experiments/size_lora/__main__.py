"""Train what is missing, seed by seed, then write the page. See the package for its options."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan_grid import of_part
from experiments.defaults.panel import PANEL, halves
from experiments.one_run import one_run
from experiments.results import once, tried, words_of
from experiments.size_lora.page import MODELS, SEEDS, SETS, WAYS, write
from luthier.core import ConfigError

RESULTS = Path(__file__).parent / "results.jsonl"
BY_NAME = {member.name: member for member in PANEL}


def main() -> None:
    words = words_of("size_lora", "model", RESULTS, __doc__, _model)
    words.add_argument("--minutes", type=float, default=float("inf"), help="start no run later than so")
    asked = words.parse_args()
    begun = time.monotonic()
    todo: list[dict[str, Any]] = [
        {"model": model, "set": name, "way": way, "seed": seed}
        for seed in range(0 if asked.page else asked.seeds)
        for model in MODELS if seed < SEEDS[model] and (not asked.only or model in asked.only)
        for name in SETS for way in WAYS
    ]  # fmt: skip
    for which in of_part(todo, asked.part):
        if time.monotonic() - begun < 60 * asked.minutes:
            once(asked.results, which, partial(tried, partial(_run, **which)))
    if asked.page or asked.results == RESULTS:  # results kept elsewhere are a trial, and no page of the docs
        write(asked.results)


def _model(name: str) -> None:
    if name not in MODELS:
        raise ConfigError(f"no model here is called {name!r}. They are {', '.join(MODELS)}.")


def _run(out: str, *, model: str, set: str, way: str, seed: int) -> tuple[list[bool], dict[str, Any]]:
    method, given = WAYS[way]
    train, test = halves(BY_NAME[set])
    return one_run(f"sample:{model}", method, seed, train, test, out, given)


if __name__ == "__main__":
    main()

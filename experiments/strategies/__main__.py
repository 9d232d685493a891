"""Train what is missing of the table, seed by seed, then write the page. See the package for its options."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan_grid import of_part
from experiments.one_run import one_run
from experiments.results import once, tried, words_of
from experiments.strategies.page import write
from experiments.strategies.scenes import SCENES, old_rows
from experiments.strategies.trials import Trial, every_trial
from luthier.training import STRATEGIES
from luthier.workflow import evaluate

RESULTS = Path(__file__).parent / "results.jsonl"


def main() -> None:
    asked = words_of("strategies", "strategy", RESULTS, __doc__, _strategies).parse_args()
    chosen = [(name, trial) for name, trial in every_trial() if not asked.only or name in asked.only]
    plain = sorted({(t.scene, n) for _, t in chosen for n in {1, t.passes}})
    for seed in range(0 if asked.page else asked.seeds):
        todo: list[tuple[dict[str, Any], Any]] = [
            ({"scene": scene, "strategy": None, "passes": times}, partial(_run, scene, None, Trial(), times, seed))
            for scene, times in plain
        ]
        todo += [
            ({"scene": trial.scene, "strategy": name, "passes": trial.passes},
             partial(_run, trial.scene, name, trial, trial.longer, seed))
            for name, trial in chosen
        ]  # fmt: skip
        for which, made in of_part(todo, asked.part):
            once(asked.results, {**which, "seed": seed}, partial(tried, made))
    if asked.page or asked.results == RESULTS:  # results kept elsewhere are a trial, and no page of the docs
        write(asked.results)


def _strategies(name: str) -> list[type]:
    return [STRATEGIES.get(one) for one in name.split("+")]


def _run(
    scene: str, strategy: str | None, trial: Trial, times: int, seed: int, out: str
) -> tuple[list[bool], dict[str, Any]]:
    """With so many times the scene's steps."""
    at = SCENES[scene]
    right, facts = one_run(
        at.start(at.method, seed) if at.start else at.model, at.method, seed, at.train(), at.test(), out, [
            *at.given, f"run.steps={times * at.steps}", *([f"run.strategy={strategy}"] if strategy else []),
            *trial.given, *trial.runs(at.method, seed),
        ],
        also=[f"{name}={path()}" for name, path in trial.also.items()],
    )  # fmt: skip
    if at.start:
        facts["old"] = round(evaluate(out, str(old_rows("test"))).scores["accuracy"], 4)
    return right, facts


if __name__ == "__main__":
    main()

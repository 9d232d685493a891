"""A run's tuning as LoRA of a given rank, and what that costs on the rows that the run held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from luthier.core import CannotMerge, LuthierError
from luthier.surgery.low_rank import LowRank, as_lora
from luthier.workflow.evaluate_run import evaluator_of
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare

__all__ = ["LoraOfRun", "lora_of_run"]


@dataclass(frozen=True)
class LoraOfRun:
    """A run with a LoRA in the place of its tuning, what became of that, and scores before and after.

    Attributes:
        unscored: why there are none.
    """

    predictor: Predictor
    low: LowRank
    before: dict[str, float]
    after: dict[str, float]
    rows: int = 0
    unscored: str = ""

    @property
    def shares(self) -> dict[str, float]:
        """The share of energy kept at each place."""
        return {share.key: share.kept for share in self.low.shares}

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it."""
        said = list(self.low.notes)
        for name, value in self.before.items():
            said += [f"{name} on {self.rows} held-out rows: {value:.4g} before, {self.after[name]:.4g} after"]
        if self.unscored:
            said += [f"not scored on held-out rows: {self.unscored}"]
        return tuple(said)


def lora_of_run(path: Path, rank: int | None) -> LoraOfRun:
    """Load a run and put a LoRA in the place of its tuning.

    Args:
        rank: None for one that computes exactly the same, where there is one.

    Raises:
        CannotMerge: see `as_lora`.
    """
    predictor = Predictor(path, dtype=torch.float32, decode=True)
    method = predictor.spec.method
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    examples, why = None, ""
    if rank is not None:
        try:
            examples = prepare(predictor.spec, begun=True).test
            why = "" if examples is not None else "the run held none out"
        except LuthierError as error:
            why = str(error)[:200]
    if examples is not None:
        before = _scores(predictor, examples)
    try:
        predictor.tuned, low = as_lora(predictor.tuned, rank)
    except CannotMerge as error:
        advice = " A LoRA of a given rank, its loss measured: --as lora --rank N." if rank is None else ""
        raise CannotMerge(f"{path} ({method}): {error}{advice}") from None
    if examples is not None:
        after = _scores(predictor, examples)
    return LoraOfRun(predictor, low, before, after, 0 if examples is None else len(examples.read_rows), why)


def _scores(predictor: Predictor, examples: object) -> dict[str, float]:
    evaluator = evaluator_of(predictor, examples)  # type: ignore[arg-type]
    return evaluator.scores_of(evaluator.outputs())

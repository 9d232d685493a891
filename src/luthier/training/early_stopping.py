"""Which evaluation was the best, and when to stop waiting for a better one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luthier.runs.spec import EvalSpec
from luthier.training import metrics

__all__ = ["Selection"]


@dataclass
class Selection:
    """Remembers the best score of one metric.

    Attributes:
        at: optimiser steps done at the last evaluation.
        best_step, best_value: of the best one; None before the first.
        waited: evaluations since then.
    """

    spec: EvalSpec
    metric: str
    at: int = 0
    best_step: int | None = None
    best_value: float | None = None
    waited: int = 0

    def note(self, step: int, scores: dict[str, float]) -> bool:
        """Note the scores of an evaluation; whether they are the best so far. What is not finite never is."""
        self.at = step
        if metrics.better(self.metric, scores[self.metric], self.best_value):
            self.best_step, self.best_value, self.waited = step, scores[self.metric], 0
            return True
        self.waited += 1
        return False

    @property
    def kept(self) -> int | None:
        """The step whose checkpoint must stay, where the best one is wanted in the end."""
        return self.best_step if self.spec.best else None

    @property
    def enough(self) -> bool:
        """Whether patience has run out."""
        return self.spec.patience is not None and self.waited >= self.spec.patience

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "at": self.at,
            "best_step": self.best_step,
            "best_value": self.best_value,
            "waited": self.waited,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.at, self.waited = int(state["at"]), int(state["waited"])
        self.best_step, self.best_value = state["best_step"], state["best_value"]

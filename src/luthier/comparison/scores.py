"""Scores of classes by weighted rows, so that a resample of rows is a weight for each."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, near

__all__ = ["LEAST", "SCORES", "score_named"]

Rows = NDArray[np.int64]
Weights = NDArray[np.float64]


def _counts(wanted: Rows, said: Rows, weights: Weights) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Weight of the rows of each class: rightly answered, answered so, wanted."""
    n = int(max(wanted.max(), said.max())) + 1
    right = wanted == said
    return (
        np.bincount(wanted[right], weights[right], n),
        np.bincount(said, weights, n),
        np.bincount(wanted, weights, n),
    )


def accuracy(wanted: Rows, said: Rows, weights: Weights) -> float:
    return float(weights[wanted == said].sum() / weights.sum())


def macro_f1(wanted: Rows, said: Rows, weights: Weights) -> float:
    """Mean F1 of the classes that occur among the rows or the answers."""
    right, answered, there = _counts(wanted, said, weights)
    occurs = answered + there > 0
    return float((2 * right[occurs] / (answered + there)[occurs]).mean())


def mcc(wanted: Rows, said: Rows, weights: Weights) -> float:
    """Matthews' correlation for several classes; 0 where either side has one class only."""
    right, answered, there = _counts(wanted, said, weights)
    n = float(weights.sum())
    spread = (n * n - float((answered**2).sum())) * (n * n - float((there**2).sum()))
    return float((right.sum() * n - (answered * there).sum()) / np.sqrt(spread)) if spread > 0 else 0.0


SCORES: dict[str, Callable[[Rows, Rows, Weights], float]] = {"accuracy": accuracy, "macro_f1": macro_f1, "mcc": mcc}

LEAST = {"mcc": -1.0}
"""The least value of a score where it is not 0; the most is 1."""


def score_named(name: str) -> Callable[[Rows, Rows, Weights], float]:
    """The score of that name.

    Raises:
        ConfigError: it is none of these.
    """
    if name not in SCORES:
        raise ConfigError(f"--metric {name!r}: runs are compared by {', '.join(SCORES)}.{near(name, list(SCORES))}")
    return SCORES[name]

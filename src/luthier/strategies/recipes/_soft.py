"""Answers of several models to the same rows, as one distribution for each row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from luthier.data.rows import Table
from luthier.training.recipe import Done

__all__ = ["logits_of", "most_sure", "soft_labels"]


def logits_of(model: Done, table: Table, labels: Sequence[str]) -> NDArray[np.float64]:
    """What a model says of rows: (rows, labels). Log-probabilities are logits but for what a softmax does not see."""
    return np.log([[max(a["probabilities"][name], 1e-30) for name in labels] for a in model.answers(table)])


def soft_labels(said: Sequence[NDArray[np.float64]], temperature: float = 1.0) -> NDArray[np.float64]:
    """softmax of several models' mean logits over a temperature: (rows, labels)."""
    logits = np.mean(said, axis=0)
    shares = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return np.asarray(shares / shares.sum(-1, keepdims=True))


def most_sure(shares: NDArray[np.float64], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """(row, label) of the surest rows of each label, at most `wanted` of it; no row twice."""
    chosen = shares.argmax(-1)
    found = []
    for label, count in enumerate(wanted):
        rows = np.flatnonzero(chosen == label)
        best = rows[np.argsort(-shares[rows, label], kind="stable")][:count]
        found += [(int(row), label) for row in best]
    return sorted(found)

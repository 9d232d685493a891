"""A loss over all rows of a step, where the step is cut into micro-batches.

    L(h_1, ..., h_n)        dL/dθ = sum over micro-batches of (dL/dh of its own rows) (dh/dθ)

The states of all rows are computed first, without a gradient; then each micro-batch takes the loss of the whole step
with its own rows' states live and the others' as they were. Dropout is that of the micro-batch's own pass, so the sum
of the gradients is that of one piece. It costs a forward pass more, and only where a step is cut.
"""

from __future__ import annotations

import torch
from torch import Tensor

from luthier.data.batches import Batch
from luthier.training.course import Course, Piece

__all__ = ["by_rows", "look_at_rows", "with_all_rows"]


@torch.no_grad()
def look_at_rows(course: Course, batches: list[Batch]) -> None:
    """Keep the states and labels of every micro-batch for this step."""
    course.aside.clear()
    for index, batch in enumerate(batches):
        with course.states() as seen:
            course.rehearse(batch, index)
        assert batch.labels is not None
        course.aside[index] = seen.pooled(batch).float(), batch.labels


def with_all_rows(course: Course, piece: Piece, states: Tensor) -> tuple[Tensor, Tensor]:
    """The states (rows of the step, d) and labels (rows of the step,): those of this micro-batch are `states`."""
    assert piece.batch.labels is not None
    parts = {**course.aside, piece.index: (states, piece.batch.labels)}
    given, labels = zip(*(parts[index] for index in sorted(parts)), strict=True)
    return torch.cat(given), torch.cat(labels)


def by_rows(mean: Tensor, piece: Piece, n_rows: int) -> Tensor:
    """A mean over the step's rows as this micro-batch's part of a sum: its value is shared out, its slope is whole."""
    share = len(piece.batch.rows) / n_rows
    return n_rows * (mean - (1 - share) * mean.detach())

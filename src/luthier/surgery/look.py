"""What a method sees of the data before training: one loss for each optimiser step, however memory cuts its rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Look", "OneRow", "gradients", "passes_of", "rows_of"]


class OneRow(NamedTuple):
    """One row of the data in a pass of its own, or in `Look.passes` several.

    Attributes:
        loss: the sum over its targets, -log p(labels | text).
        logits: (rows, classes) or (rows, tokens, classes); None where they are never all held.
        labels: what was right, as the model was given it.
    """

    loss: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None


class Look:
    """The mean loss of one whole step, as a sum of pieces that fit in memory one by one.

    Attributes:
        rows: the rows of the step one by one, for what is no sum over them.
        passes: the same pieces, each with the logits of its rows.
    """

    def __init__(
        self,
        pieces: Sequence[Callable[[], Tensor]],
        rows: Sequence[Callable[[], OneRow]] = (),
        passes: Sequence[Callable[[], OneRow]] = (),
    ) -> None:
        self.pieces, self.rows, self.passes = tuple(pieces), tuple(rows), tuple(passes)

    def __call__(self) -> Tensor:
        """The loss of the step, with the graph of all its pieces."""
        return torch.stack([piece() for piece in self.pieces]).sum()


def rows_of(look: Callable[[], Tensor]) -> Sequence[Callable[[], OneRow]]:
    """The rows of a step one by one; a plain function that gives a loss counts as one row."""
    return look.rows if isinstance(look, Look) and look.rows else (lambda: OneRow(look()),)


def passes_of(look: Callable[[], Tensor]) -> Sequence[Callable[[], OneRow]]:
    """The passes of a step with their logits; none of a plain function, which gives a loss alone."""
    return look.passes if isinstance(look, Look) else ()


def gradients(look: Callable[[], Tensor], parameters: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradient of the whole step, in fp32 at least; one piece's graph at a time, and no `.grad` is filled.

    Whoever squares gradients has to square these: squares of pieces depend on where memory cut.
    """
    found: list[Tensor | None] = [None] * len(parameters)
    for piece in look.pieces if isinstance(look, Look) else (look,):
        for i, grad in enumerate(torch.autograd.grad(piece(), parameters, allow_unused=True)):
            if grad is not None:
                wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
                before = found[i]
                found[i] = wide if before is None else before + wide
    return found

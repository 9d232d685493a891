"""A pull of trained numbers to where they were: its slope is added to the gradients, and its size is told.

As a penalty in torch's own operations every number is read or written sixteen times in a step, and tables of the
model's size are made anew, which the system has to clear first. Here numbers, rests and gradients are read once and
the gradients written once, piece by piece, beside two buffers that stay in the cache. What is left is memory: four
tables of the model's size (five with `stiff`), where an update by AdamW takes seven.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["pull"]

PIECE = 1 << 19
"""Numbers that are looked at together on a CPU: two megabytes of each table, beside which a call costs little."""

Rest = Tensor | None


@torch.no_grad()
def pull(
    values: Sequence[Tensor], rests: Sequence[Rest], weights: Sequence[float], stiff: Sequence[Tensor] | None = None
) -> float:
    """Add the gradient of  sum over tensors of  weight / 2 * stiff * (value - rest)^2  to the values' gradients.

    Called once a step, when the gradient of the loss is whole. What takes no gradient gets none.

    >>> value = torch.tensor([1.0, 3.0], requires_grad=True)
    >>> pull([value], [torch.tensor([1.0, 1.0])], [0.5])
    1.0
    >>> value.grad
    tensor([0., 1.])

    Args:
        rests: where each is pulled to, of the shape of its value; None, to zero.
        weights: of each tensor.
        stiff: of each number, of the shapes of the values; left out, 1.

    Returns:
        The sum.
    """
    shares: list[Tensor] = []
    hards: Sequence[Rest] = stiff or [None] * len(values)
    spare: Tensor | None = None
    for value, rest, weight, hard in zip(values, rests, weights, hards, strict=True):
        if value.requires_grad and value.grad is None:
            value.grad = torch.zeros_like(value)
        slope = value.grad if value.requires_grad else None
        tables = [value, rest, hard, slope]
        whole = value.device.type != "cpu" or not all(t is None or t.is_contiguous() for t in tables)
        rows = [t if t is None or whole else t.view(-1) for t in tables]
        n = value.numel() if whole else min(PIECE, value.numel())
        if spare is None or spare.shape[1] < n or (spare.dtype, spare.device) != (value.dtype, value.device):
            spare = torch.empty(2, n, dtype=value.dtype, device=value.device)
        for start in range(0, value.numel(), max(1, n)):
            pieces = rows if whole else [t if t is None else t[start : start + n] for t in rows]
            shares.append(_pulled(pieces, weight, spare))
    return float(torch.stack(shares).sum()) / 2 if shares else 0.0


def _pulled(pieces: Sequence[Tensor | None], weight: float, spare: Tensor) -> Tensor:
    """One piece of one tensor: its slope is added; twice its share of the sum."""
    value, rest, hard, slope = pieces
    assert value is not None
    away, stiffly = (row[: value.numel()].view(value.shape) for row in spare)
    if rest is None:
        away.copy_(value)
    else:
        torch.sub(value, rest, out=away)
    pulls = away if hard is None else torch.mul(away, hard, out=stiffly)
    if slope is not None:
        slope.add_(pulls, alpha=weight)
    return weight * torch.dot(away.view(-1), pulls.view(-1)).float()

"""A pull of trained numbers to where they were, as a penalty whose gradient is made while the numbers are in the cache.

As a sum of torch's own operations every number is read or written sixteen times in a step. Here the difference, its
share of the sum and its slope are made piece by piece: numbers and rests are read once, and the slope is written once
and added once to the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["pull"]

PIECE = 1 << 17
"""Numbers that are looked at together on a CPU: half a megabyte of each table."""

Rest = Tensor | None


def pull(
    values: Sequence[Tensor], rests: Sequence[Rest], weights: Sequence[float], stiff: Sequence[Tensor] | None = None
) -> Tensor:
    """sum over tensors of  weight / 2 * stiff * (value - rest)^2, and its gradient on the values.

    Args:
        rests: where each is pulled to, of the shape of its value; None, to zero.
        weights: of each tensor.
        stiff: of each number, of the shapes of the values; left out, 1.
    """
    return _Pull.apply(rests, weights, stiff or [None] * len(values), *values)  # type: ignore[no-any-return,no-untyped-call]


class _Pull(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rests: Sequence[Rest], weights: Sequence[float], stiff: Sequence[Tensor | None], *values: Tensor
    ) -> Tensor:
        total = torch.zeros((), device=values[0].device)
        ctx.slopes = []
        for value, rest, weight, hard in zip(values, rests, weights, stiff, strict=True):
            away = torch.empty(value.numel(), dtype=value.dtype, device=value.device)
            flat, size = value.reshape(-1), PIECE if value.device.type == "cpu" else value.numel()
            for start in range(0, len(flat), max(1, size)):
                piece = slice(start, start + size)
                part = away[piece]
                if rest is None:
                    part.copy_(flat[piece])
                else:
                    torch.sub(flat[piece], rest.reshape(-1)[piece], out=part)
                far = part.clone()
                part.mul_(weight)
                if hard is not None:
                    part.mul_(hard.reshape(-1)[piece])
                total += torch.sum(far.mul_(part), dtype=torch.float32)
            ctx.slopes.append(away.view_as(value))
        return total / 2

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        slopes, ctx.slopes = ctx.slopes, []
        if float(grads[0]) != 1:
            torch._foreach_mul_(slopes, float(grads[0]))
        return (None, None, None, *slopes)

"""An update whose gradient is written down as it passes, beside what made it."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["Watched"]


class Watched(torch.autograd.Function):
    """`Watched.apply(update, x, seen)` is the update; in the backward pass, (its gradient, x) is put into `seen`.

    x goes through the graph's own store, so that activation checkpointing does not keep it longer.
    """

    @staticmethod
    def forward(ctx: Any, update: Tensor, x: Tensor | None, seen: list[tuple[Tensor, Tensor | None]]) -> Tensor:
        ctx.seen = seen
        if x is not None:
            ctx.save_for_backward(x)
        return update.view_as(update)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        saved = ctx.saved_tensors  # read once: checkpointing gives it once
        ctx.seen.append((grads[0].detach(), saved[0].detach() if saved else None))
        return grads[0], None, None

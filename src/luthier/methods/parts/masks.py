"""Choosing exactly k entries of several tensors, and looking at data without leaving a trace."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.core import key
from luthier.surgery import Batches, TunedView

__all__ = ["first_share", "no_trace", "pack", "top_k", "unpack"]


@torch.no_grad()
def top_k(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks, shaped as `scores`, of the k largest entries of all of them together.

    Exactly k are true: equal scores are taken in the order of the list, then of the entries. A threshold would take
    whole groups of ties, and zeros tie often.
    """
    flat = torch.cat([s.detach().flatten() for s in scores]) if len(scores) > 1 else scores[0].detach().flatten()
    if k <= 0:
        chosen = torch.zeros_like(flat, dtype=torch.bool)
    elif k >= flat.numel():
        chosen = torch.ones_like(flat, dtype=torch.bool)
    else:
        last = torch.topk(flat, k, sorted=False).values.min()
        chosen = flat > last
        ties = (flat == last).nonzero().flatten()
        chosen[ties[: k - int(chosen.sum())]] = True
    parts = torch.split(chosen, [s.numel() for s in scores])
    return [part.view(s.shape) for part, s in zip(parts, scores, strict=True)]


def pack(mask: Tensor) -> Tensor:
    """Eight entries of a mask in one byte, the first in the lowest bit: (n,) bool -> (ceil(n / 8),) uint8."""
    flat = mask.flatten().to(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


def unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack` for a mask of `shape`."""
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: shape.numel()].view(shape).bool()


def first_share(batches: Batches, share: float) -> Batches:
    """The first `share` of the batches, at least one where there is any."""
    return batches[: max(1, math.ceil(share * len(batches) - 1e-9))]


@contextmanager
def no_trace(tuned: TunedView, *, training: bool, seed: int = 0) -> Iterator[None]:
    """Look at data inside: modes, buffers and generators are afterwards as they were before.

    Gradients are for the caller: take them with `surgery.gradients`, which fills no `.grad`.
    """
    modes: dict[nn.Module, bool] = {m: m.training for m in tuned.model.modules()}
    buffers = [(b, b.clone()) for b in tuned.model.buffers()]
    with torch.random.fork_rng():
        torch.manual_seed(key(seed, "look"))
        try:
            tuned.model.train(training)
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)

"""Choosing exactly k entries of several tensors, and looking at data without leaving a trace."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.core import key
from luthier.surgery import Batches, TunedView

__all__ = ["first_share", "no_trace", "pack", "top_k", "unpack"]


_LARGE = 2**20
"""Scores of more numbers than so are counted: a selection of the library holds 16 bytes beside each of them."""
_PIECE = 2**20
_HALF = 16
"""Bits of a score that one look at all of them tells apart."""


@torch.no_grad()
def top_k(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks, shaped as `scores`, of the k largest entries of all of them together.

    Exactly k are true: equal scores are taken in the order of the list, then of the entries. A threshold would take
    whole groups of ties, and zeros tie often.
    """
    sizes = [s.numel() for s in scores]
    if k <= 0 or k >= sum(sizes):
        return [torch.full_like(s, k > 0, dtype=torch.bool) for s in scores]
    if sum(sizes) > _LARGE and all(s.dtype in (torch.float32, torch.bfloat16, torch.float16) for s in scores):
        return _above(scores, _kth_largest(scores, k), k)
    flat = torch.cat([s.flatten() for s in scores])  # of hundreds of small ones, one look is the quicker
    (chosen,) = _above([flat], torch.topk(flat, k, sorted=False).values.min(), k)
    return [part.view(s.shape) for part, s in zip(torch.split(chosen, sizes), scores, strict=True)]


def _above(scores: Sequence[Tensor], last: Tensor, k: int) -> list[Tensor]:
    """What is larger than the k-th, and of what equals it the first, until there are k."""
    chosen = [s > last for s in scores]
    left = k - sum(int(c.sum()) for c in chosen)
    for score, mask in zip(scores, chosen, strict=True):
        if left:
            ties = (score == last).flatten().nonzero().flatten()[:left]
            mask.view(-1)[ties] = True
            left -= len(ties)
    return chosen


def _kth_largest(scores: Sequence[Tensor], k: int) -> Tensor:
    """The k-th largest of all scores, by counting: two looks at them, and nothing as large as they are is held.

    The bits of a float, read as a whole number, have the order of the floats where the sign is taken care of. The first
    look counts the upper halves, the second the lower ones of those whose upper half is that of the k-th.
    """
    upper, k = _bin_of_kth((key >> _HALF for key in _keys(scores)), k)
    lower, _ = _bin_of_kth((key[key >> _HALF == upper] & (2**_HALF - 1) for key in _keys(scores)), k)
    key = upper << _HALF | lower
    bits = key - 2**31 if key >= 2**31 else -1 - key
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(scores[0].device)


def _keys(scores: Sequence[Tensor]) -> Iterator[Tensor]:
    """Whole numbers from 0 to 2^32 - 1 in the order of the scores, piece by piece."""
    for score in scores:
        for piece in torch.split(score.detach().reshape(-1), _PIECE):
            bits = (piece.float() + 0.0).view(torch.int32).long()  # -0.0 and 0.0 are one number: + 0.0 makes it that
            yield torch.where(bits >= 0, bits + 2**31, -1 - bits)


def _bin_of_kth(numbers: Iterable[Tensor], k: int) -> tuple[int, int]:
    """Which of 2^16 the k-th largest is, and the how manieth of those that equal it."""
    counts = sum(torch.bincount(piece, minlength=2**_HALF).cpu() for piece in numbers)
    assert isinstance(counts, Tensor)
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, k))
    return 2**_HALF - 1 - place, k - (int(from_above[place - 1]) if place else 0)


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

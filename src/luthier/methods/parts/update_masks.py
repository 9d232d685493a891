"""Masks over the model's own tensors: which tensors a share is counted on, how many entries it is, and their choice."""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, is_projection
from luthier.core import ConfigError
from luthier.methods.parts.masks import top_k
from luthier.surgery.unfrozen import Unfrozen

__all__ = ["Over", "Scope", "add_squares", "choose_masks", "kept", "maskable", "sizes_of"]

Scope = Literal["model", "tensor"]
Over = Literal["all", "blocks", "matrices"]


def maskable(anatomy: Anatomy, over: Over) -> tuple[str, ...]:
    """Names of tensors below the head: all of them, those of the blocks, or the blocks' projection weights."""
    heads = set(anatomy.head_tensors)
    names = tuple(n for n in anatomy.tensors if n not in heads)
    if over == "all":
        return names
    if over == "matrices":
        held = {f"{s.path}.{s.param}" for s in anatomy.all_sites if s.layer is not None and is_projection(s)}
        held = {anatomy.tied.get(n, n) for n in held}
        return tuple(n for n in names if n in held)
    blocks = tuple(f"{block.path}." for block in anatomy.blocks)
    return tuple(n for n in names if n.startswith(blocks))


def sizes_of(anatomy: Anatomy, names: Sequence[str]) -> list[int]:
    """How many numbers each of the tensors has."""
    return [math.prod(anatomy.tensors[n]) for n in names]


def kept(sizes: Sequence[int], share: float, scope: Scope, asked_by: str) -> int:
    """Entries that the share keeps: of all tensors together, or of each by itself, rounded down.

    Raises:
        ConfigError: it keeps nothing, or everything.
    """
    total = sum(sizes)
    k = math.floor(share * total) if scope == "model" else sum(math.floor(share * n) for n in sizes)
    if k <= 0 or share <= 0:
        raise ConfigError(
            f"{asked_by}.share: {share:g} of {total} numbers keeps none. Set it above {1 / max(sizes):.2g}."
        )
    if share >= 1:
        raise ConfigError(f"{asked_by}.share: {share:g} keeps every number, and no mask is left. Use full, or less.")
    return k


def add_squares(
    scores: Sequence[Tensor], grads: Iterable[Tensor | None], weight: float, *, clip: float = math.inf
) -> None:
    """Add to each score, in fp32, `weight` times the square of its gradient, where there is one.

    clip: largest norm of one gradient; a larger one is made as small.
    """
    for score, grad in zip(scores, grads, strict=True):
        if grad is not None:
            wide = grad.float()
            if clip < math.inf:
                wide = wide * (clip / (torch.linalg.vector_norm(wide) + 1e-6)).clamp(max=1.0)
            score.addcmul_(wide, wide, value=weight)


@torch.no_grad()
def choose_masks(unfrozen: Sequence[Unfrozen], scores: Sequence[Tensor], share: float, scope: Scope) -> None:
    """Let the best `share` of the entries move; exactly that many, ties going to the earlier ones."""
    if scope == "model":
        found = top_k(scores, math.floor(share * sum(s.numel() for s in scores)))
    else:
        found = [top_k([s], math.floor(share * s.numel()))[0] for s in scores]
    for one, mask in zip(unfrozen, found, strict=True):
        one.mask = mask

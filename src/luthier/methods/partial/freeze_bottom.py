"""Freeze the bottom: embeddings and the first blocks stay, the rest trains.

    h_l = block_l(h_{l-1})          l <= n stays; everything above trains

Nothing changes before the first step.

Lee, Tang, Lin 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", arXiv:1911.03090. Its message
is that about the top quarter is enough, which is the default here: floor(0.75 L) blocks stay.

Count: all numbers below the head, without the embeddings and without the n first blocks; in BERT (L - n) blocks of
4 d^2 + 4 d + 2 d m + m + d + 4 d, and the pooler, d^2 + d.
Claims: the top quarter of the blocks recovers most of the quality of full fine-tuning.
Cost: the backward pass ends at the first block that trains.
Use it when: full fine-tuning does not fit, or forgets too much.
Not when: files must be small: lora is far smaller.
Pitfalls: position embeddings and the embedding's norm are embeddings too; relative position biases that a first block
holds for all of them stay with it; in an encoder-decoder the first blocks of both stacks stay.
"""

import fnmatch
import math
from dataclasses import dataclass
from typing import Annotated

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ConfigError, at_least, between, near
from luthier.methods.parts.in_place import TrainsInPlace
from luthier.surgery import METHODS


@METHODS.register("freeze_bottom", family="partial", paper="arXiv:1911.03090")
@dataclass(frozen=True, kw_only=True)
class FreezeBottom(TrainsInPlace):
    """Settings of freezing the bottom."""

    share: Annotated[float, "share of the blocks that stay, from the first, rounded down", between(0, 1)] = 0.75
    blocks: Annotated[int | None, "how many blocks stay, instead of a share", at_least(0)] = None
    layers: Annotated[tuple[int, ...], "which blocks stay, counted from 0, instead of a share"] = ()
    embeddings: Annotated[bool, "embeddings stay, and what stands between them and the first block"] = True
    names: Annotated[tuple[str, ...], "further tensors that stay, such as *.bias"] = ()

    def __post_init__(self) -> None:
        if self.blocks is not None and self.layers:
            raise ConfigError("freeze_bottom: blocks says how many stay and layers which. Give one of them.")

    def tensors(self, anatomy: Anatomy) -> list[str]:
        """What trains; every other tensor below the head stays."""
        stay = tuple(f"{b.path}." for b in anatomy.blocks if b.layer in self._frozen(anatomy, b.stack))
        heads = set(anatomy.head_tensors)
        bottom = _bottom(anatomy) if self.embeddings else set()
        named = [n for n in anatomy.tensors if n not in heads and n not in bottom and not n.startswith(stay)]
        for pattern in self.names:
            if not fnmatch.filter(anatomy.tensors, pattern):
                raise AnatomyError(
                    f"freeze_bottom.names: {pattern!r} fits no tensor.{near(pattern, list(anatomy.tensors))} "
                    "Names are those of model.named_parameters(), and * stands for anything."
                )
        named = [n for n in named if not any(fnmatch.fnmatchcase(n, p) for p in self.names)]
        if not named and not heads:
            raise ConfigError(f"freeze_bottom: nothing of this {anatomy.model_type} model is left to train.")
        return named

    def _frozen(self, anatomy: Anatomy, stack: str) -> set[int]:
        depth = anatomy.depths[stack]
        if self.layers:
            wrong = [n for n in self.layers if not 0 <= n < max(anatomy.depths.values())]
            if wrong:
                raise ConfigError(f"freeze_bottom.layers: no block {wrong[0]}; they are 0 to {depth - 1}.")
            return set(self.layers)
        n = math.floor(self.share * depth) if self.blocks is None else self.blocks
        if n > depth:
            raise ConfigError(
                f"freeze_bottom.blocks: {n}, but this {anatomy.model_type} model has {depth} in a stack. "
                f"Set it to {depth} or less; head_only trains the head alone."
            )
        return set(range(n))


def _bottom(anatomy: Anatomy) -> set[str]:
    """Tensors in front of the blocks: all outside of them but poolers, final norms and an untied output matrix."""
    inside = tuple(f"{b.path}." for b in anatomy.blocks)
    above = {
        f"{s.path}.{short}"
        for s in anatomy.all_sites
        if (s.kind == "norm" and s.part.startswith(("final", "head"))) or s.kind == "head"
        for short in (s.param, s.bias)
        if short
    }
    outside = [n for n in anatomy.tensors if not n.startswith(inside) and n not in anatomy.head_tensors]
    return {n for n in outside if n not in above and ".pooler." not in f".{n}"}

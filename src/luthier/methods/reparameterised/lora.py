"""LoRA: leave the weight frozen, train a product of two thin matrices beside it.

    y = x W^T + b + (alpha / rank) dropout(x) A^T B^T          A: (rank, d_in)    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1. A is drawn from
U(±1/sqrt(d_in)), as the authors' code does; the paper says Gaussian.

Count: sum over sites of rank * (d_in + d_out).
Claims: quality of full fine-tuning with a fraction of its trained numbers; no cost at inference once merged.
Pitfalls: the effective scale is alpha / rank, so raising the rank alone weakens the update; dropout belongs on the
branch, never on the base path; a bf16 merge loses most of a small update, so merging is done in fp32 and cast once;
at the first step A has no gradient at all, because B is zero.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least, between
from luthier.kernels import GroupedUpdates, StillUpdate, Update, low_rank_linear
from luthier.methods._low_rank import SmallDropout, check_projections, fusable
from luthier.surgery import METHODS, Attachment, Base, PerSite


@METHODS.register("lora", family="reparameterised", paper="arXiv:2106.09685")
@dataclass(frozen=True, kw_only=True)
class LoRA(PerSite):
    """Settings of LoRA."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ("attn.q", "attn.v")
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-3

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        return check_projections(anatomy, super().places(anatomy), "lora", self.dropout)

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return ThinUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank, self.dropout)


class ThinUpdate(Attachment):
    """Adds `scale * B A x` to the output."""

    kind = "delta"

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = SmallDropout(dropout)
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + (self.dropout(x, self.training) @ self.a.T @ self.b.T) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.b @ self.a * self.scale, bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        seed = self.dropout.seed(self.training)
        p = 0.0 if seed is None else self.dropout.p
        return low_rank_linear(x, base.frozen(), base.bias(), self.a, self.b, self.scale, p, seed)

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        if not fusable(base):
            return None
        return StillUpdate(base.frozen(), base.bias(), Update(self.a, self.b, self.scale))

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> GroupedUpdates:
        return GroupedUpdates([Update(m.a, m.b, m.scale) for m in members if isinstance(m, ThinUpdate)], dtype)

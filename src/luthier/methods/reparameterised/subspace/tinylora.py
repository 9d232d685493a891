"""TinyLoRA: LoRA-XS whose square matrix is a sum of frozen random ones; a site trains a few numbers, or shares them.

    y = x W^T + b + B (v_1 P_1 + ... + v_u P_u) A x      A = S_r^1/2 V_r^T    B = U_r S_r^1/2      P_k: (rank, rank)

v starts at zero, so the tuned model starts as the base model. A, B and P are frozen; P is drawn from `draw` and the
place of the site among all, with a variance of 1 / rank.

"Learning to Reason in 13 Parameters" 2026, arXiv:2602.04118. The form is that of peft 0.21, which also chose how P is
drawn, as the paper does not say.

Count: size for each group of sites; tying=0: each site is one; tying=1: all are one.
Claims: a large model trained with reinforcement learning needs hardly any numbers.
Use it when: a tuning must fit into bytes.
Not when: facts are to be learnt: a dozen numbers hold none.
Pitfalls: which P a site has depends on all the sites chosen; rates far above LoRA's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.anatomy.selection import is_projection
from luthier.core import at_least, between
from luthier.methods.parts.low_rank import check_projections
from luthier.methods.parts.principal import FrozenFrame, check_principal, frame_params
from luthier.surgery import METHODS, Attach, Base, Edit, Method


@METHODS.register("tinylora", family="reparameterised", paper="arXiv:2602.04118")
@dataclass(frozen=True, kw_only=True)
class TinyLoRA(Method):
    """Settings of TinyLoRA."""

    sites: Annotated[tuple[str, ...], "where to attach: attn.q, ffn, attn.q@0-5, *@last4"] = ("attn.q", "attn.v")
    rank: Annotated[int, "directions of the weight", at_least(1)] = 2
    size: Annotated[int, "trained numbers of a group of sites", at_least(1)] = 64
    tying: Annotated[float, "0: each site has its own numbers; 1: all share them", between(0, 1)] = 0.0
    draw: Annotated[int, "which random matrices: any whole number", at_least(0)] = 42
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    mergeable: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True
    start_is_drawn: ClassVar[bool] = False  # what is drawn follows from `draw`
    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"rank": 4, "size": 16, "lr": 5e-2}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        """The sites, in the order of the model."""
        sites = anatomy.sites(*self.sites, asked_by="tinylora.sites", fits=is_projection)
        return check_principal(self.rank, check_projections(anatomy, sites, "tinylora", self.dropout), "tinylora.rank")

    def n_groups(self, sites: tuple[Site, ...]) -> int:
        """How many groups of neighbouring sites have numbers of their own."""
        return max(1, round(len(sites) * (1 - self.tying)))

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        n = self.n_groups(sites)
        group = max(1, len(sites) // n)
        values = [Values(self.size) for _ in range(n)]
        for i, site in enumerate(sites):
            k = min(i // group, n - 1)
            made = partial(self._mixed, values[k], self.draw + i)
            yield Attach(site, made, {f"values{k}": values[k]})

    def n_params(self, anatomy: Anatomy) -> int:
        return self.size * self.n_groups(self.places(anatomy))

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + frame_params(self.rank, self.places(anatomy))

    def _mixed(self, values: "Values", draw: int, base: Base) -> "MixedBetween":
        return MixedBetween(values, base, self.rank, draw, self.dropout)


class Values(nn.Module):
    """v: (size,) of one group."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.v = nn.Parameter(torch.zeros(size))


class MixedBetween(FrozenFrame):
    """R is the mixture of P: (size, rank, rank) that v says."""

    p: Tensor

    def __init__(self, values: Values, base: Base, rank: int, draw: int, dropout: float) -> None:
        super().__init__(base, rank, dropout)
        self.__dict__["values"] = values  # registered once, on the tuning
        drawn = torch.Generator().manual_seed(draw)
        # On the CPU and in this order, as peft draws it: one number then names the same matrices there and here.
        p = torch.empty(len(values.v), rank, rank, device="cpu").normal_(0, rank**-0.5, generator=drawn)
        self.register_buffer("p", p, persistent=False)

    def middle(self) -> Tensor:
        values: Values = self.__dict__["values"]
        return torch.einsum("u,uij->ij", values.v, self.p.to(values.v.dtype))

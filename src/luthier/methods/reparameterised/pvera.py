"""PVeRA: VeRA whose middle vector is drawn in training: one half of it says the mean, the other how far from it.

    y = x W^T + b + v * (B z)      z = m + e * exp(l / 2)      [m ; l] = d * (A x)      e normal, 0 outside of training

A: (2 rank, d_in) and B: (d_out, rank) are one frozen pair for the whole model, made again from `draw`. v starts at
zero, so the tuned model starts as the base model; answers and merged weights take the mean, e = 0.

"PVeRA: Probabilistic Vector-Based Random Matrix Adaptation", arXiv:2512.07703. The form is that of peft 0.21; its
answers by draws (`sample_at_inference`) are not built.

Count: sum over sites of d_out + 2 rank.
Claims: ahead of VeRA in image models, and a spread of answers where they are drawn.
Use it when: VeRA fits its rows too closely.
Not when: time counts: the branch is half again VeRA's.
Pitfalls: a pair for every layer is not VeRA; the pair depends on the widest site, so other `sites` are another pair;
nothing holds the spread up, so training may shrink it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least, between
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.random_pair import OfPair, RandomPair
from luthier.surgery import METHODS, Attachment, Base, Edit, PeftForm, attach_each


@METHODS.register("pvera", family="reparameterised", paper="arXiv:2512.07703")
@dataclass(frozen=True, kw_only=True)
class PVeRA(AtProjections):
    """Settings of PVeRA."""

    rank: Annotated[int, "width of the frozen matrices", at_least(1)] = 256
    start: Annotated[float, "where d starts"] = 0.1
    draw: Annotated[int, "which pair of matrices: any whole number", at_least(0)] = 0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    start_is_drawn: ClassVar[bool] = False
    draws: ClassVar[bool] = True
    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"rank": 7, "start": 0.125, "lr": 5e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "PVERA",
        {"pvera_lambda_b": "v", "pvera_lambda_d": "d"},
        {"r": "rank", "projection_prng_key": "draw", "d_initial": "start"},
        {"sample_at_inference": False},
        ignored=("pvera_dropout", "save_projection", "generator_seed"),
        write=lambda method: {"save_projection": False},
        shared={"base_model.pvera_A": ("pair", "a"), "base_model.pvera_B": ("pair", "b")},
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        pair = RandomPair(max(s.d_in for s in sites), max(s.d_out for s in sites), self.rank, self.draw, halves=2)
        yield from attach_each(sites, partial(self._drawn, pair), shared={"pair": pair})

    def params_at(self, site: Site) -> int:
        return site.d_out + 2 * self.rank

    def build(self, site: Site, base: Base) -> Attachment:
        return self._drawn(RandomPair(site.d_in, site.d_out, self.rank, self.draw, halves=2), site, base)

    def _drawn(self, pair: RandomPair, site: Site, base: Base) -> Attachment:
        return DrawnPair(pair, site.d_in, site.d_out, self.start, self.dropout)


class DrawnPair(OfPair):
    """Adds `v * (B z)`. v: (d_out,)   d: (2 rank,), the mean's and the spread's."""

    def thin(self) -> tuple[Tensor, Tensor]:
        """Those of the mean."""
        a, b = self.frozen()
        rank = b.shape[1]
        return a[:rank] * self.d[:rank, None], b * self.v[:, None]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.frozen()
        mean, spread = ((self.dropout(x, self.training) @ a.T) * self.d).chunk(2, dim=-1)
        if self.training:  # from the ambient generator, which activation checkpointing restores
            mean = mean + torch.randn_like(mean) * torch.exp(spread / 2)
        return y + (mean @ b.T) * self.v

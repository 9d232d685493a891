"""VeRA: one pair of random frozen matrices for the whole model; each site trains two vectors that scale them.

    y = x W^T + b + v * (B (d * (A x)))      A: (rank, d_in)    B: (d_out, rank)    d: (rank,)    v: (d_out,)

A and B are the first rows and columns of one pair, large enough for every site, and are made again from `draw`, never
stored. v starts at zero and d at 0.1, so the tuned model starts as the base model.

Kopiczko, Blankevoort, Asano 2023, "VeRA: Vector-based Random Matrix Adaptation", arXiv:2310.11454, section 3. The pair
is drawn as peft draws it, on the CPU whatever the device, so one number means one pair everywhere.

Count: sum over sites of d_out + rank.
Claims: LoRA's quality at a tenth of its numbers or less, because large random ranks cost nothing to store.
Use it when: thousands of tunings are kept.
Not when: time counts: at rank 256 the branch is a large product in every pass.
Pitfalls: a pair for every layer is not VeRA; the pair depends on the widest site, so other `sites` are another pair;
rates ten times LoRA's.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least, between
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.random_pair import OfPair, RandomPair
from luthier.surgery import METHODS, Attachment, Base, Edit, PeftForm, attach_each


@METHODS.register("vera", family="reparameterised", paper="arXiv:2310.11454")
@dataclass(frozen=True, kw_only=True)
class VeRA(AtProjections):
    """Settings of VeRA."""

    rank: Annotated[int, "width of the frozen matrices", at_least(1)] = 256
    start: Annotated[float, "where d starts"] = 0.1
    draw: Annotated[int, "which pair of matrices: any whole number", at_least(0)] = 0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-2
    tiny: ClassVar[dict[str, float]] = {"rank": 7, "start": 0.125, "lr": 5e-2}  # a number whose spread is exactly 0
    peft: ClassVar[PeftForm | None] = PeftForm(
        "VERA",
        {"vera_lambda_b": "v", "vera_lambda_d": "d"},
        {"r": "rank", "projection_prng_key": "draw", "d_initial": "start"},
        ignored=("vera_dropout", "save_projection"),
        write=lambda method: {"save_projection": False},
        shared={"base_model.vera_A": ("pair", "a"), "base_model.vera_B": ("pair", "b")},
    )

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        sites = self.places(anatomy)
        pair = RandomPair(max(s.d_in for s in sites), max(s.d_out for s in sites), self.rank, self.draw)
        yield from attach_each(sites, partial(self._scaled, pair), shared={"pair": pair})

    def params_at(self, site: Site) -> int:
        return site.d_out + self.rank

    def build(self, site: Site, base: Base) -> Attachment:
        return self._scaled(RandomPair(site.d_in, site.d_out, self.rank, self.draw), site, base)

    def _scaled(self, pair: RandomPair, site: Site, base: Base) -> Attachment:
        return ScaledPair(pair, site.d_in, site.d_out, self.start, self.dropout)


class ScaledPair(OfPair):
    """Adds `v * (B (d * (A x)))`; A and B are the pair's."""

    def thin(self) -> tuple[Tensor, Tensor]:
        a, b = self.frozen()
        return a * self.d[:, None], b * self.v[:, None]

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.frozen()
        return y + ((self.dropout(x, self.training) @ a.T) * self.d) @ b.T * self.v

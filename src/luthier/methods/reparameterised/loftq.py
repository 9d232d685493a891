"""LoftQ: LoRA that starts from what the base lost when it was quantised.

    y = x Q^T + b + s x A^T B^T      s = alpha / rank      in turns Q = quant(W - s B A), s B A = rank r of W - Q

Over a base in codes (`--store`, nf4 where a run names nothing else) the tuned model starts nearer to the float model
than the codes alone. With `rounds=1` Q is the base as it is held, and only A and B are new. Each further round makes
codes of the tuning's own, which act in place of the base's and are saved with it: as many bytes as the base again.

Li, Yu, Liang, He, Karampatziakis, Chen, Zhao 2023, "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language
Models", arXiv:2310.08659, algorithm 1. The paper takes five rounds; the default here is one, which leaves the base
shared and the file small. A and B are divided by sqrt(s); the authors' script leaves that out, and starts off by s.
Over a base in floats nothing is lost, and it starts as LoRA does; a run with `--store bf16` or `fp32` is refused.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: better than QLoRA from 4 bits on downwards, most at 2.
Measured: docs/stored-bases.md, by `python benchmarks/stored_bases.py`.
Cost: a step of qlora: each pass decodes each weight. Before the first one, one decomposition a round and site.
Pitfalls: it needs the float weights at the start, which are read again from the model's files, one at a time; the error
need not fall in each round; a base other than the one it was made on is refused when it is loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least, between
from luthier.kernels import StillUpdate, StoredLinear, low_rank_linear
from luthier.methods.parts.low_rank import ThinUpdate, fusable
from luthier.methods.parts.principal import check_principal
from luthier.methods.parts.projections import AtProjections
from luthier.methods.parts.starts import thin_start
from luthier.surgery import METHODS, Attachment, Base


class Recoded(ThinUpdate):
    """A low-rank update beside codes of its own, which stand in place of the layer's."""

    def __init__(self, base: Base, own: StoredLinear, rank: int, scale: float, dropout: float) -> None:
        super().__init__(own.in_features, own.out_features, rank, scale, dropout)
        self.base, self.own = base, own

    def _codes(self) -> StoredLinear:
        self.own.dtype = self.base.dtype  # it has been cast to fp32 with A and B
        return self.own

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        other = (self._codes().decoded() - self.base.weight()).to(x.dtype)
        return super().after(x, y + torch.nn.functional.linear(x, other))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return super().merged(self._codes().decoded().to(weight.dtype), bias)

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if not fusable(base):
            return None
        seed = self.dropout.seed(self.training)
        p = 0.0 if seed is None else self.dropout.p
        return low_rank_linear(x, self._codes().held, base.bias(), self.a, self.b, self.scale, p, seed)

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        return StillUpdate(self._codes().held, base.bias(), self._update()) if fusable(base) else None

    @classmethod
    def together(cls, members: object, dtype: torch.dtype) -> None:
        """None: each stands on codes of its own."""


@METHODS.register("loftq", family="reparameterised", paper="arXiv:2310.08659")
@dataclass(frozen=True, kw_only=True)
class LoftQ(AtProjections):
    """Settings of LoftQ."""

    sites: Annotated[tuple[str, ...], "where to attach"] = ("*",)
    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 16
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0
    rounds: Annotated[int, "turns of quantising and decomposing; above 1, with codes of its own", between(1, 20)] = 1

    starts_at_base: ClassVar[bool] = True  # of a base in floats; over codes it starts nearer to those
    default_lr: ClassVar[float] = 2e-4
    store: ClassVar[str | None] = "nf4"
    tiny: ClassVar[dict[str, int]] = {"rank": 3}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        return check_principal(self.rank, sites, "loftq.rank")

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        scale = self.alpha / self.rank
        lost = base.lost()
        made = ThinUpdate(site.d_in, site.d_out, self.rank, scale, self.dropout)
        if lost is None or (not lost.is_meta and not lost.any()):
            return made
        a, b = thin_start(lost, self.rank, "svd", scale)
        if self.rounds > 1:
            assert base.stored is not None
            whole = base.weight().float() + lost
            for _ in range(self.rounds - 1):
                own = StoredLinear(whole - scale * b @ a, None, base.stored.form, base.dtype)
                a, b = thin_start(whole - own.decoded().float(), self.rank, "svd", scale)
            made = Recoded(base, own, self.rank, scale, self.dropout)
        made.a.data, made.b.data = a, b
        return made

"""DyLoRA: one training whose every shorter rank is a usable LoRA: each step trains a prefix of drawn length.

    y = x W^T + b + (alpha / r) x A[:r]^T B[:, :r]^T      A: (rank, d_in)    B: (d_out, rank)    r drawn for each step

B starts at zero, so the tuned model starts as the base model. r is one number for all sites, uniform between `smallest`
and `rank`; without training it is `use`.

Valipour et al. 2022, "DyLoRA: Parameter Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank
Adaptation", arXiv:2210.07558, section 4. With only_last=true row r of A and column r of B alone move in a step (the
paper's FROZEN), under every optimiser: what its moments move besides is put back.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: no search for the rank; better than a LoRA cut to that rank, at little loss at the full one.
Use it when: the rank is chosen after training, or differs by where it is served (`use`).
Not when: the rank is known: LoRA is as good and learns faster.
Pitfalls: alpha / rank kept after cutting makes short prefixes too weak; a rank drawn for each site, or each
micro-batch, is another method; judging the full rank alone.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, TunedView


@METHODS.register("dylora", family="reparameterised", paper="arXiv:2210.07558")
@dataclass(frozen=True, kw_only=True)
class DyLoRA(AtProjections):
    """Settings of DyLoRA."""

    rank: Annotated[int, "largest width of the two thin matrices", at_least(1)] = 8
    smallest: Annotated[int, "shortest prefix that is trained", at_least(1)] = 1
    use: Annotated[int, "width that acts when nothing is trained; 0: all", at_least(0)] = 0
    alpha: Annotated[float, "the update is scaled by alpha / the width that acts", above(0)] = 16.0
    only_last: Annotated[bool, "a step moves the last row and column of its prefix alone"] = False
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 1e-2}

    def __post_init__(self) -> None:
        for name, value in (("smallest", self.smallest), ("use", self.use)):
            if value > self.rank:
                raise ConfigError(f"dylora.{name}: {value} is above the rank {self.rank}. Use {self.rank} or less.")

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return Prefix(site.d_in, site.d_out, self.rank, self.alpha, self.use or self.rank, self.dropout)

    def before_step(self, tuned: TunedView, step: int, total: int) -> None:
        drawn = int(torch.randint(self.smallest, self.rank + 1, ()))
        for module in own_modules(self, tuned, Prefix):
            module.begin(drawn, only_last=self.only_last)

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        for module in own_modules(self, tuned, Prefix):
            module.end()


class Prefix(ThinUpdate):
    """Adds `alpha / r * B[:, :r] A[:r] x`; r is drawn in training and `use` otherwise."""

    def __init__(self, d_in: int, d_out: int, rank: int, alpha: float, use: int, dropout: float) -> None:
        super().__init__(d_in, d_out, rank, 1.0, dropout)
        self.alpha, self.use = alpha, use
        self.drawn = rank
        self._before: tuple[Tensor, Tensor] | None = None

    def thin(self) -> tuple[Tensor, Tensor]:
        r = self.drawn if self.training else self.use
        return self.a[:r], self.b[:, :r] * (self.alpha / r)

    @torch.no_grad()
    def begin(self, drawn: int, *, only_last: bool) -> None:
        """Take this prefix for the step; where its last part alone may move, remember the others."""
        self.drawn = drawn
        self._before = (self.a.detach().clone(), self.b.detach().clone()) if only_last else None

    @torch.no_grad()
    def end(self) -> None:
        """Put back what was not to move."""
        if self._before is not None:
            a, b = self._before
            last = self.drawn - 1
            a[last], b[:, last] = self.a[last], self.b[:, last]
            self.a.copy_(a)
            self.b.copy_(b)
            self._before = None

"""SoRA: LoRA with a gate on each of its rank-one parts; a proximal step drives gates to exactly zero.

    y = x W^T + b + s ((x A^T) * g) B^T      A: (rank, d_in)    B: (d_out, rank)    g: (rank,)    s = alpha / rank

    after each step      g <- sign(g) max(|g| - threshold, 0)

B starts at zero, A and g are drawn, so the tuned model starts as the base model.

Ding N. et al. 2023, "Sparse Low-rank Adaptation of Pre-trained Language Models", arXiv:2311.11696, section 3. The
threshold is a constant, as in the authors' main code; the paper's is the learning rate times a weight. Gates do not
decay. What is stored are the parts whose gate is not zero.

Count: sum over sites of rank * (d_in + d_out + 1) in training; stored is what is left.
Claims: finds the rank that each site needs, and ends smaller than a LoRA of the same quality.
Use it when: nobody knows which rank a site needs, and the run is long enough for gates to close.
Not when: the run has a few dozen steps: gates need about |g| / threshold steps to close.
Pitfalls: a penalty in the loss with Adam gives small gates and no zeros; a closed gate stops A and B behind it, so it
comes back only while those are not zero.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import above, at_least, between
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.methods.parts.own_tensors import group_names, own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Group, TunedView


@METHODS.register("sora", family="reparameterised", paper="arXiv:2311.11696")
@dataclass(frozen=True, kw_only=True)
class SoRA(AtProjections):
    """Settings of SoRA."""

    rank: Annotated[int, "rank-one parts at the start", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 16.0
    threshold: Annotated[float, "how far each step draws a gate towards zero", at_least(0)] = 5e-4
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 1e-2}

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out + 1)

    def build(self, site: Site, base: Base) -> Attachment:
        return GatedUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank, self.dropout)

    def groups(self, tuned: TunedView) -> list[Group]:
        return [Group(group_names(tuned, (m.g for m in own_modules(self, tuned, GatedUpdate))), weight_decay=0.0)]

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        for module in own_modules(self, tuned, GatedUpdate):
            module.shrink(self.threshold)

    def finish(self, tuned: TunedView) -> None:
        for module in own_modules(self, tuned, GatedUpdate):
            module.restore(module.stored())


class GatedUpdate(ThinUpdate):
    """Adds `scale * B diag(g) A x`."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__(d_in, d_out, rank, scale, dropout)
        self.g = nn.Parameter(torch.randn(rank))

    def thin(self) -> tuple[Tensor, Tensor]:
        return self.a * self.g[:, None], self.b

    @torch.no_grad()
    def shrink(self, threshold: float) -> None:
        """Move each gate towards zero by the threshold, and no further than zero."""
        self.g.copy_(self.g.sign() * (self.g.abs() - threshold).clamp_min(0))

    def stored(self) -> dict[str, Tensor]:
        """The parts whose gate is open."""
        a, b, g = self.a.detach(), self.b.detach(), self.g.detach()
        return {"a": a[g != 0], "b": b[:, g != 0], "g": g[g != 0]}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        if set(tensors) != {"a", "b", "g"}:
            raise KeyError(f"a gated site stores a, b and g, the file has {', '.join(sorted(tensors)) or 'none'}")
        for name, value in tensors.items():
            setattr(self, name, nn.Parameter(value.to(self.g).contiguous().clone(), requires_grad=self.g.requires_grad))

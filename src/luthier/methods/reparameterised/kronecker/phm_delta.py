"""PHM delta: the update is a sum of Kronecker products, whose first factors are shared by the whole model.

    y = x W^T + b + s sum_k (A_k (x) s_k t_k) x      A_k: (n, n), shared    s_k: (d_out / n, r)    t_k: (r, d_in / n)

k runs to n. Every t_k starts at zero, so the tuned model starts as the base model.

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647, sections 3
and 4, taken here for the update of a weight. It is computed as one thin product of inner width n n r. `kadaptation` is
this with rank-one A_k.

Count: n^3 once (2 n^2 where slow=rank_one), and sum over sites of r (d_in + d_out).
Claims: knowledge that all layers share lies in the A_k, what is a layer's own in s_k and t_k; rank up to n r at the
size of a LoRA of rank r.
Use it when: the tuning must be tiny and the layers are alike.
Not when: sites of very different kinds are tuned at once: they would share one rule.
Pitfalls: s_k and t_k both at zero never move; n must divide every width; A_k saved with every layer is saved L times.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least, between
from luthier.methods.parts.kronecker import Rule, check_divides, phm_thin
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, Edit, attach_each


@METHODS.register("phm_delta", family="reparameterised", paper="arXiv:2106.04647")
@dataclass(frozen=True, kw_only=True)
class PHMDelta(AtProjections):
    """Settings of PHM delta."""

    n: Annotated[int, "summands, and side of the shared matrices: a divisor of every width", at_least(1)] = 4
    rank: Annotated[int, "inner width of s_k t_k", at_least(1)] = 1
    slow: Annotated[Literal["full", "rank_one"], "what the shared matrices are"] = "full"
    scale: Annotated[float, "multiplies the update", above(0)] = 1.0
    dropout: Annotated[float, "share of the update's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 5e-3

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.n, f"{self._label}.n", site, "d_out", "d_in")
        return sites

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        rule = Rule(self.n, rank_one=self.slow == "rank_one")
        yield from attach_each(self.places(anatomy), partial(self._update, rule), shared={"rule": rule})

    def n_params(self, anatomy: Anatomy) -> int:
        return super().n_params(anatomy) + (2 * self.n**2 if self.slow == "rank_one" else self.n**3)

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return self._update(Rule(self.n, rank_one=self.slow == "rank_one"), site, base)

    def _update(self, rule: Rule, site: Site, base: Base) -> Attachment:
        return SharedRuleUpdate(rule, site.d_in // self.n, site.d_out // self.n, self.rank, self.scale, self.dropout)


class SharedRuleUpdate(Thin):
    """Adds `scale * sum_k (A_k (x) s_k t_k) x`; the A_k are the rule's."""

    def __init__(self, rule: Rule, d_in: int, d_out: int, rank: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        self.__dict__["rule"] = rule  # registered once, on the tuning
        n = len(rule.whole())
        self.s = nn.Parameter(torch.randn(n, d_out, rank) / math.sqrt(rank))
        self.t = nn.Parameter(torch.zeros(n, rank, d_in))

    def thin(self) -> tuple[Tensor, Tensor]:
        return phm_thin(self.__dict__["rule"], self.s, self.t)

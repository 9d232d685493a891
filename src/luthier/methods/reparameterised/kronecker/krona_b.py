"""KronA-B: a Kronecker product that reads what the feed-forward layer reads, added to what that layer gives.

    f(x) <- f(x) + s (A (x) B) x + s_res x      A: (a1, a2)    B: (b1, b2)    a1 b1 = a2 b2 = d    s_res: one number

B starts at zero and s_res at `residual_start`, so the tuned model starts as the base model. Without `residual` there is
no s_res.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650, section 3. Where
s_res starts is not known to us; at 0 the start is the base model. `krona_b_res` is this with `residual=true`.

Count: per layer a1 a2 + b1 b2; one more with `residual`.
Claims: better than KronA inside the attention at the same size; costs its product at inference, where KronA merges.
Use it when: KronA is too small a change and the tuning may stay beside the weights.
Not when: no cost at inference is allowed: it does not merge.
Pitfalls: the branch lies beside the layer, not behind it; it reads what the layer itself reads, after a norm that comes
before the layer.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import above, at_least
from luthier.methods.parts.bottleneck import check_sublayers
from luthier.methods.parts.kronecker import check_divides, kron_linear, near_square
from luthier.surgery import METHODS, Attachment, Edit, Method, attach_each


@METHODS.register("krona_b", family="reparameterised", paper="arXiv:2212.10650")
@dataclass(frozen=True, kw_only=True)
class KronAB(Method):
    """Settings of KronA-B."""

    sites: Annotated[tuple[str, ...], "beside which sublayers: ffn_out, attn_out, ffn_out@last4"] = ("ffn_out",)
    rows: Annotated[int, "rows of A, a divisor of d; 0: the one nearest its root", at_least(0)] = 0
    scale: Annotated[float, "multiplies the product", above(0)] = 1.0
    residual: Annotated[bool, "also add s_res times what the layer reads, s_res learned"] = False
    residual_start: Annotated[float, "where s_res starts"] = 0.0

    default_lr: ClassVar[float] = 5e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts_at_base", not self.residual or self.residual_start == 0)

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        start = self.residual_start if self.residual else None
        yield from attach_each(self._sites(anatomy), lambda site, base: Branch(*self._first(site), self.scale, start))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(self._product(site) + int(self.residual) for site in self._sites(anatomy))

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        found = anatomy.sites(*self.sites, asked_by=f"{self.name}.sites", fits=is_sublayer)
        for site in check_sublayers(found, self.name):
            check_divides(self.rows or 1, f"{self.name}.rows", site, "d_out")
        return found

    def _product(self, site: Site) -> int:
        a1, a2 = self._first(site)
        return a1 * a2 + (site.d_out // a1) * (site.d_out // a2)

    def _first(self, site: Site) -> tuple[int, int]:
        a1 = self.rows or near_square(site.d_out)[0]
        return a1, site.d_out // a1


class Branch(Attachment):
    """Adds `scale * (A (x) B) x`, and s_res x, to what the sublayer gives."""

    kind = "parallel"

    def __init__(self, a1: int, a2: int, scale: float, residual: float | None) -> None:
        super().__init__()
        self.scale = scale
        self.a = nn.Parameter(torch.empty(a1, a2))
        self.b = nn.Parameter(torch.zeros(a2, a1))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.residual = None if residual is None else nn.Parameter(torch.tensor(float(residual)))

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        y = y + kron_linear(x, self.a, self.b) * self.scale
        return y if self.residual is None else y + self.residual * x

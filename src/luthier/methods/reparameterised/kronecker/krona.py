"""KronA: leave the weight frozen, train a Kronecker product of two small matrices beside it.

    y = x W^T + b + s (A (x) B) x      A: (a1, a2)    B: (b1, b2)    a1 b1 = d_out    a2 b2 = d_in

B starts at zero, so the tuned model starts as the base model.

Edalati et al. 2022, "KronA: Parameter Efficient Tuning with Kronecker Adapter", arXiv:2212.10650, section 3. Which of
the two starts at zero is our choice; no code was published. Computed as A X B^T, which never holds A (x) B.

Count: sum over sites of a1 a2 + b1 b2; at the defaults both are about sqrt(d_in d_out).
Claims: the rank of the update is the product of the ranks of A and B, so it may be full where LoRA's is a handful, with
fewer numbers than LoRA at rank 1.
Use it when: the tuning must be tiny, and a low rank is what holds LoRA back.
Not when: the widths have no factors near their roots (11008 = 86 * 128 is fine, a prime is not).
Pitfalls: a1 and a2 are sizes of A, no rank; the order of the factors decides which numbers of x meet, and a swapped
order is another function; `scale` is tuned for each task in the paper, and is 1 here.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least
from luthier.methods.parts.kronecker import KroneckerUpdate, check_divides, near_square
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base


@METHODS.register("krona", family="reparameterised", paper="arXiv:2212.10650")
@dataclass(frozen=True, kw_only=True)
class KronA(AtProjections):
    """Settings of KronA."""

    rows: Annotated[int, "rows of A, a divisor of d_out; 0: the one nearest its root", at_least(0)] = 0
    columns: Annotated[int, "columns of A, a divisor of d_in; 0: the one nearest its root", at_least(0)] = 0
    scale: Annotated[float, "multiplies the update", above(0)] = 1.0

    default_lr: ClassVar[float] = 5e-3

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.rows or 1, "krona.rows", site, "d_out")
            check_divides(self.columns or 1, "krona.columns", site, "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        a1, a2 = self._first(site)
        return a1 * a2 + (site.d_out // a1) * (site.d_in // a2)

    def build(self, site: Site, base: Base) -> Attachment:
        a1, a2 = self._first(site)
        return Factors(a1, a2, site.d_out // a1, site.d_in // a2, self.scale)

    def _first(self, site: Site) -> tuple[int, int]:
        # One factor has the smaller part of d_out and the larger of d_in: then both hold about as many numbers.
        return self.rows or near_square(site.d_out)[0], self.columns or near_square(site.d_in)[1]


class Factors(KroneckerUpdate):
    """Adds `scale * (A (x) B) x`; A and B are what trains."""

    def __init__(self, a1: int, a2: int, b1: int, b2: int, scale: float) -> None:
        super().__init__(scale)
        self.a = nn.Parameter(torch.empty(a1, a2))
        self.b = nn.Parameter(torch.zeros(b1, b2))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.a, self.b

"""Compacter: an adapter behind each sublayer whose two matrices are sums of Kronecker products with a shared factor.

    y + H_u f(H_d y + b_d) + b_u      H = sum_k A_k (x) (s_k t_k)      A_k: (n, n), one set for the whole model
    s_k: (out / n, r)    t_k: (r, in / n)    of each matrix      H_d: (width, d)    H_u: (d, width)

The width is d / reduction. Everything starts small and random, so the tuned model starts near the base model; with
`zero_up` it starts there exactly.

Karimi Mahabadi, Henderson, Ruder 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", arXiv:2106.04647,
section 3. As in the authors' code the norms train too, and the A_k start normal with deviation 0.01.

Count: n^3 + adapters * (2 r (d + width) + width + d), two adapters a layer; and all norms, 2 d each.
Claims: 0.073 % of T5-base trained, norms included.
Cost: in every pass the matrices of two adapters a layer are put together, and all norms have gradients.
Use it when: an adapter must be tens of kilobytes.
Not when: a tuning must merge, or steps must be as cheap as an ordinary adapter's.
Pitfalls: A_k of its own for each layer, in training or in the file, costs n^3 each time; n has to divide d and the
width; what is called the rank is that of s_k t_k, while H has a rank of up to n^2 r.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import ConfigError, at_least
from luthier.methods.parts.bottleneck import Activation, check_sublayers, width_of
from luthier.methods.parts.kronecker import Rule, phm_weight
from luthier.methods.parts.own_tensors import group_names, own_modules, own_unfrozen
from luthier.surgery import METHODS, Attachment, Base, Edit, Group, Method, TunedView, Unfreeze, attach_each


@METHODS.register("compacter", family="hybrid", paper="arXiv:2106.04647")
@dataclass(frozen=True, kw_only=True)
class Compacter(Method):
    """Settings of Compacter."""

    sites: Annotated[tuple[str, ...], "sublayers that an adapter closes"] = ("attn_out", "ffn_out")
    reduction: Annotated[int, "the model's width over the adapter's", at_least(1)] = 32
    n: Annotated[int, "summands, and side of the shared matrices: a divisor of both widths", at_least(1)] = 4
    rank: Annotated[int, "inner width of s_k t_k", at_least(1)] = 1
    activation: Annotated[Activation, "between the two matrices"] = "gelu"
    norms: Annotated[bool, "also train all norms"] = True
    zero_up: Annotated[bool, "the second matrix starts at zero"] = False

    starts_at_base: ClassVar[bool] = False
    default_lr: ClassVar[float] = 3e-3
    trains_base: ClassVar[bool] = True
    tiny: ClassVar[dict[str, float]] = {"reduction": 4, "lr": 3e-2}

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        rule = Rule(self.n)
        nn.init.normal_(rule.a, std=0.01)
        yield from attach_each(self._sites(anatomy), partial(self._closing, rule), shared={"rule": rule})
        yield from (Unfreeze(name) for name in self._norms(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        total = self.n**3 + sum(math.prod(anatomy.tensors[n]) for n in self._norms(anatomy))
        for site in self._sites(anatomy):
            d, width = width_of(site), self._width(site)
            total += 2 * self.rank * (d + width) + width + d
        return total

    def groups(self, tuned: TunedView) -> list[Group]:
        biases = [b for m in own_modules(self, tuned, Closing) for b in (m.down_bias, m.up_bias)]
        norms = [u.parameter for u in own_unfrozen(self, tuned)]
        return [Group(group_names(tuned, biases + norms), weight_decay=0.0)]

    def _closing(self, rule: Rule, site: Site, base: Base) -> Attachment:
        return Closing(rule, width_of(site), self._width(site), self.rank, self.activation, self.zero_up)

    def _sites(self, anatomy: Anatomy) -> tuple[Site, ...]:
        label = f"{self.name}.sites"
        return check_sublayers(anatomy.sites(*self.sites, asked_by=label, fits=is_sublayer), self.name)

    def _width(self, site: Site) -> int:
        d = width_of(site)
        if d % self.reduction or d % self.n or (d // self.reduction) % self.n:
            fits = [r for r in range(1, d + 1) if d % r == 0 and (d // r) % self.n == 0 and d % self.n == 0]
            near = sorted(sorted(fits, key=lambda r: abs(r - self.reduction))[:3])
            raise ConfigError(
                f"{self.name}.reduction: the width {d} of {site.key} over {self.reduction} must be whole and, like "
                f"{d}, divisible by n = {self.n}. "
                + (f"Near it, {', '.join(map(str, near))} will do." if near else f"Choose an n that divides {d}.")
            )
        return d // self.reduction

    def _norms(self, anatomy: Anatomy) -> list[str]:
        heads = set(anatomy.head_tensors)
        return [n for n in anatomy.norm_tensors() if self.norms and n not in heads]


class Closing(Attachment):
    """The adapter behind one sublayer; the A_k are the rule's."""

    kind = "sequential"
    needs_input = False

    def __init__(self, rule: Rule, d: int, width: int, rank: int, activation: Activation, zero_up: bool) -> None:
        super().__init__()
        self.__dict__["rule"] = rule  # registered once, on the tuning
        self.activation = activation
        n = len(rule.whole())
        self.down_s, self.down_t = _factors(n, width, d, rank)
        self.up_s, self.up_t = _factors(n, d, width, rank)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(d))
        if zero_up:
            nn.init.zeros_(self.up_t)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """H_d: (width, d) and H_u: (d, width)."""
        rule = self.__dict__["rule"]
        return phm_weight(rule, self.down_s, self.down_t), phm_weight(rule, self.up_s, self.up_t)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        down, up = self.matrices()
        return kernels.bottleneck(y, y, down, self.down_bias, up, self.up_bias, 1.0, self.activation)


def _factors(n: int, out: int, into: int, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """s: (n, out / n, rank) and t: (n, rank, in / n), Glorot-uniform with gain sqrt(2)."""
    s, t = torch.empty(n, out // n, rank), torch.empty(n, rank, into // n)
    for pair in (s, t):
        for one in pair:
            nn.init.xavier_uniform_(one, gain=math.sqrt(2))
    return nn.Parameter(s), nn.Parameter(t)

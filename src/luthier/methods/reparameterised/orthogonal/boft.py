"""BOFT: turn what a layer reads by a few rounds of small rotations, each round pairing other numbers, like an FFT.

    y = s * ((x M_m ... M_1) W^T) + b      M_i = P_i diag(R_i1, ..., R_in) P_i^T      R = (I - Q) (I + Q)^-1

P_i gathers, in groups of 2^i blocks, the even halves before the odd ones; Q = (A - A^T) / 2 of A: (block, block), s:
(d_out,). A starts at zero and s at one, so the tuned model starts as the base model.

Liu W. et al. 2023, "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", arXiv:2311.06243,
section 4. All entries of A are held, as in peft, though only the skew part acts. Where peft was built without its
CUDA code it takes one factor whatever was asked for; here as many as are set are computed everywhere.

Count: sum over sites of factors d_in block + d_out.
Claims: a dense rotation from O(d log d) numbers, where OFT's blocks never mix.
Use it when: OFT's blocks are what limits it.
Not when: a step's time counts: each factor reads and writes the input once.
Pitfalls: 2^(factors - 1) block must divide the inputs; half of the stored numbers do nothing.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.low_rank import live_bias
from luthier.methods.parts.orthogonal import cayley, turn_blocks
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("boft", family="reparameterised", paper="arXiv:2311.06243")
@dataclass(frozen=True, kw_only=True)
class BOFT(AtProjections):
    """Settings of BOFT."""

    block: Annotated[int, "side of a rotation: even, a divisor of d_in", at_least(2)] = 8
    factors: Annotated[int, "rounds of rotations, 1: OFT", at_least(1)] = 2

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, float]] = {"block": 4, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "BOFT",
        {"boft_R": "a", "boft_s": "s"},
        {"boft_block_size": "block", "boft_n_butterfly_factor": "factors"},
        {"boft_block_num": 0},
        ignored=("boft_dropout",),
    )

    def __post_init__(self) -> None:
        if self.block % 2:
            raise ConfigError(f"boft.block: {self.block} is odd, and half blocks are exchanged. Use {self.block + 1}.")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.block * 2 ** (self.factors - 1), "boft.block * 2^(factors - 1)", site, "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        return self.factors * site.d_in * self.block + site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return Butterfly(base, site, self.block, self.factors)


def paired(width: int, block: int, factor: int) -> Tensor:
    """P of one factor as places: in each group of 2^factor blocks, the even half blocks before the odd ones."""
    halves = torch.arange(width).view(-1, 2**factor, 2, block // 2)  # (groups, pairs, even or odd, half)
    return halves.transpose(1, 2).reshape(-1)


class Butterfly(Attachment):
    """Turns what the layer reads by `factors` rounds, and scales what it gives."""

    kind = "delta"
    there: Tensor
    back: Tensor

    def __init__(self, base: Base, site: Site, block: int, factors: int) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.zeros(factors, site.d_in // block, block, block))
        self.s = nn.Parameter(torch.ones(site.d_out, 1))
        orders = torch.stack([paired(site.d_in, block, i) for i in range(factors)])
        self.register_buffer("there", orders, persistent=False)
        self.register_buffer("back", orders.argsort(1), persistent=False)

    def rotations(self) -> Tensor:
        """R of each factor and block, (factors, n, block, block)."""
        q = (self.a - self.a.transpose(2, 3)) / 2
        return cayley(q.flatten(0, 1)).view_as(self.a)

    def turn(self, x: Tensor, rounds: list[int], r: Tensor) -> Tensor:
        """x times the factors named in `rounds`, in that order."""
        for i in rounds:
            x = turn_blocks(x[..., self.back[i]], r[i].to(x.dtype))[..., self.there[i]]
        return x

    def before(self, x: Tensor) -> Tensor:
        r = self.rotations()
        return self.turn(x, list(range(len(r)))[::-1], r)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        bias, s = live_bias(self.base), self.s[:, 0]
        return y * s if bias is None else (y - bias) * s + bias

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r = self.rotations().transpose(2, 3)
        return self.turn(weight, list(range(len(r))), r) * self.s, bias

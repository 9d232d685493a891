"""HRA: turn what a layer reads by a chain of Householder reflections that are learned.

    y = (H_1 ... H_r x) W^T + b      H_k = I - 2 u_k u_k^T / |u_k|^2      u_k: (d_in,)

The u_k start equal in pairs, whose reflections cancel, so the tuned model starts as the base model.

Yuan, Liu, Xu 2024, "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation",
arXiv:2405.17484. The form is that of peft 0.21 without its Gram-Schmidt option. The chain is applied at once, as
I - U T U^T with a small triangular T, and never as a (d_in, d_in) matrix.

Count: sum over sites of rank * d_in.
Claims: an orthogonal change and a low-rank one at the same time; keeps lengths and angles as OFT does.
Use it when: little data, and what the base can do must survive.
Not when: the rank must be odd, which no start at the base allows.
Pitfalls: u_k have no length that matters, so decay does nothing to the function and moves their rate of change.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import ConfigError, at_least
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("hra", family="reparameterised", paper="arXiv:2405.17484")
@dataclass(frozen=True, kw_only=True)
class HRA(AtProjections):
    """Settings of HRA."""

    rank: Annotated[int, "reflections of each site: even", at_least(2)] = 8

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 4, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "HRA", {"hra_u": "u"}, {"r": "rank"}, {"apply_GS": False}, transposed=False
    )

    def __post_init__(self) -> None:
        if self.rank % 2:
            raise ConfigError(
                f"hra.rank: {self.rank} is odd; reflections cancel in pairs only, and the start is the base model's. "
                f"Use {self.rank + 1}."
            )

    def params_at(self, site: Site) -> int:
        return self.rank * site.d_in

    def build(self, site: Site, base: Base) -> Attachment:
        return Reflections(site.d_in, self.rank)


class Reflections(Attachment):
    """Turns what the layer reads by the chain of reflections. u: (d_in, rank)."""

    kind = "delta"

    def __init__(self, d_in: int, rank: int) -> None:
        super().__init__()
        half = torch.empty(d_in, rank // 2)
        nn.init.kaiming_uniform_(half, a=math.sqrt(5))
        self.u = nn.Parameter(half.repeat_interleave(2, 1))

    def chain(self) -> tuple[Tensor, Tensor]:
        """V and V M, (d_in, rank) each, with H_1 ... H_r = I - V M V^T.

        With U of the u_k at length one the chain is I - U T U^T. V holds the first of each pair and how far the second
        lies from it, U = V C and M = C T C^T: while they are equal all of it is zero, and not two large terms that
        cancel. Small enough for float64.
        """
        u = self.u.double()
        u = u / torch.linalg.vector_norm(u, dim=0)
        one = torch.eye(u.shape[1], dtype=u.dtype, device=u.device)
        t = torch.linalg.solve_triangular(torch.triu(u.T @ u, 1) + one / 2, one, upper=True)
        c = one + torch.diag(one[0].new_tensor([1.0, 0.0] * (len(one) // 2))[:-1], 1)  # second = first + difference
        v = torch.stack([u[:, ::2], u[:, 1::2] - u[:, ::2]], 2).flatten(1)  # (d_in, pairs, 2), in pairs
        return v, v @ (c @ t @ c.T)

    def before(self, x: Tensor) -> Tensor:
        v, vm = (m.to(x.dtype) for m in self.chain())
        return x - (x @ v) @ vm.T

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v, vm = (m.to(weight.dtype) for m in self.chain())
        return weight - (weight @ vm) @ v.T, bias

"""LoHa: the update is the product, entry by entry, of two thin products, so its rank may be the square of theirs.

    y = x W^T + b + s ((B_1 A_1) * (B_2 A_2)) x      A_k: (rank, d_in)    B_k: (d_out, rank)    s = alpha / rank

A_2 starts at zero and the other three are drawn, so the tuned model starts as the base model.

Hyeon-Woo, Ye-Bin, Oh 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning",
arXiv:2108.06098, section 2; as a tuning, Yeh et al. 2023, arXiv:2309.14859. Which factor starts at zero is peft's
choice.

Count: sum over sites of 2 rank (d_in + d_out).
Claims: rank up to rank^2 at the size of a LoRA of twice the rank.
Use it when: a low rank is what holds LoRA back.
Not when: memory or time is short: an update as large as the weight is made in every pass.
Pitfalls: both factors of one pair at zero stop the other pair for a step, both pairs at zero stop it for good.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import above, at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("loha", family="reparameterised", paper="arXiv:2108.06098")
@dataclass(frozen=True, kw_only=True)
class LoHa(AtProjections):
    """Settings of LoHa."""

    rank: Annotated[int, "width of each thin product", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 8.0

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LOHA",
        {f"hada_w{n}_{theirs}": f"{ours}{n}" for n in (1, 2) for theirs, ours in (("a", "b"), ("b", "a"))},
        {"r": "rank", "alpha": "alpha"},
        ignored=("rank_dropout", "module_dropout", "use_effective_conv2d"),
        transposed=False,
    )

    def params_at(self, site: Site) -> int:
        return 2 * self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return HadamardUpdate(site.d_in, site.d_out, self.rank, self.alpha / self.rank)


class HadamardUpdate(DenseUpdate):
    """Adds `scale * ((B1 A1) * (B2 A2)) x`."""

    def __init__(self, d_in: int, d_out: int, rank: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.a1, self.b1 = nn.Parameter(torch.empty(rank, d_in)), nn.Parameter(torch.empty(d_out, rank))
        self.a2, self.b2 = nn.Parameter(torch.zeros(rank, d_in)), nn.Parameter(torch.empty(d_out, rank))
        for drawn in (self.a1, self.b1, self.b2):
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))

    def update(self) -> Tensor:
        return (self.b1 @ self.a1) * (self.b2 @ self.a2) * self.scale

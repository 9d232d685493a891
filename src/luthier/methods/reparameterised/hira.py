"""HiRA: the update is the weight itself, entry by entry times a low-rank matrix.

    y = x (W + W * (B A))^T + b      A: (rank, d_in)    B: (d_out, rank)

B starts at zero, so the tuned model starts as the base model.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models",
openreview:TwJrTz9cRS. The form is that of peft 0.21: no scale.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: the update's rank is bounded by that of W and not by the rank, at LoRA's size, and it merges.
Use it when: a low rank is what holds LoRA back.
Not when: memory or time is short: an update as large as the weight is made in every pass; or the base is quantised.
Pitfalls: where W is zero nothing can change; a merge into a weight that another tuning has changed uses the base's own.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("hira", family="reparameterised", paper="openreview:TwJrTz9cRS")
@dataclass(frozen=True, kw_only=True)
class HiRA(AtProjections):
    """Settings of HiRA."""

    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 32

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 3e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "HIRA", {"hira_A": "a", "hira_B": "b"}, {"r": "rank"}, ignored=("hira_dropout",)
    )

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return WeightedUpdate(base, site.d_in, site.d_out, self.rank)


class WeightedUpdate(DenseUpdate):
    """Adds `(W * (B A)) x`."""

    reads_base_weight = True

    def __init__(self, base: Base, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        base.weight()  # refuses a quantised one
        self.base = base
        self.a = nn.Parameter(torch.empty(rank, d_in))
        self.b = nn.Parameter(torch.zeros(d_out, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def update(self) -> Tensor:
        return self.base.weight().to(self.a.dtype) * (self.b @ self.a)

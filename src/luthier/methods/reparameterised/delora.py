"""DeLoRA: LoRA whose rank-one parts all have length one, times a strength that is learned.

    y = x W^T + b + (l / rank) sum_k b_k (a_k * w) x / (|a_k| |b_k|)      l: one number    w: (d_in,), |columns of W|

B starts at zero, so the tuned model starts as the base model; lengths below 1e-4 count as that. l starts at `strength`.

Bini, Girrbach, Akata 2025, "Decoupling Angles and Strength in Low-rank Adaptation", arXiv:2503.18225. The form is that
of peft 0.21, w included, which is measured once on the frozen weight.

Count: sum over sites of rank * (d_in + d_out) + 1.
Claims: the size of the update is bounded by l, so that long runs and large rates do not drift away from the base.
Use it when: training is unstable, or its length is unknown.
Not when: the first steps must be small: an update of any size has length l at once.
Pitfalls: `strength` is a size and not a scale: where LoRA grows slowly from zero, this starts near it after one step.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import above, at_least, between
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("delora", family="reparameterised", paper="arXiv:2503.18225")
@dataclass(frozen=True, kw_only=True)
class DeLoRA(AtProjections):
    """Settings of DeLoRA."""

    rank: Annotated[int, "width of the two thin matrices", at_least(1)] = 8
    strength: Annotated[float, "where the learned strength starts", above(0)] = 15.0
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "strength": 0.5, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "DELORA",
        {"delora_A": "a", "delora_B": "b", "delora_lambda": "strength", "delora_w_norm": "lengths"},
        {"r": "rank", "delora_lambda": "strength"},
        ignored=("module_dropout",),
        silent=("lambda_pattern",),
        transposed=False,
    )

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out) + 1

    def build(self, site: Site, base: Base) -> Attachment:
        return UnitUpdate(base, self.rank, self.strength, self.dropout)


class UnitUpdate(Thin):
    """Adds a sum of rank-one parts of length one, times the strength."""

    lengths: Tensor
    reads_base_weight = True

    def __init__(self, base: Base, rank: int, strength: float, dropout: float) -> None:
        super().__init__(1.0, dropout)
        weight = base.weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.a = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.b = nn.Parameter(torch.zeros(weight.shape[0], rank))
        self.strength = nn.Parameter(torch.full((1,), strength))
        # It follows from the base and is not stored.
        self.register_buffer("lengths", torch.linalg.vector_norm(weight.to(wide), dim=0), persistent=False)
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))

    def thin(self) -> tuple[Tensor, Tensor]:
        long_a = torch.linalg.vector_norm(self.a, dim=1).clamp_min(1e-4)
        long_b = torch.linalg.vector_norm(self.b, dim=0).clamp_min(1e-4)
        return self.a * self.lengths.to(self.a.dtype), self.b * (self.strength / len(self.a) / (long_a * long_b))

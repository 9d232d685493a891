"""LoRA-XS: train a small square matrix between the leading singular directions of the weight.

    y = x W^T + b + B R A x      A = S_r^1/2 V_r^T    B = U_r S_r^1/2    of W = U S V^T      R: (rank, rank), trained

R starts at zero, so the tuned model starts as the base model. A and B are frozen.

Bałazy et al. 2024, "LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters", arXiv:2405.17604. Here
each of A and B has the root of the singular values, as in TinyLoRA's form in peft 0.21: with all of them on one side
the same function has other gradients.

Count: sum over sites of rank^2, whatever their widths. The file holds A and B too.
Claims: the size of a tuning no longer grows with the model.
Use it when: thousands of tunings are kept, of one base whose A and B could be shared.
Not when: the change must reach directions that the weight hardly has.
Pitfalls: rates above LoRA's; a base other than the one it was made on is refused.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least, between
from luthier.methods.parts.principal import FrozenFrame, check_principal, frame_params
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base


@METHODS.register("lora_xs", family="reparameterised", paper="arXiv:2405.17604")
@dataclass(frozen=True, kw_only=True)
class LoRAXS(AtProjections):
    """Settings of LoRA-XS."""

    rank: Annotated[int, "directions of the weight; R is rank x rank", at_least(1)] = 25
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    start_is_drawn: ClassVar[bool] = False
    default_lr: ClassVar[float] = 4e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 5, "lr": 3e-2}

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        return check_principal(self.rank, sites, "lora_xs.rank")

    def params_at(self, site: Site) -> int:
        return self.rank * self.rank

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + frame_params(self.rank, self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        return SquareBetween(base, self.rank, self.dropout)


class SquareBetween(FrozenFrame):
    """R is what trains."""

    def __init__(self, base: Base, rank: int, dropout: float) -> None:
        super().__init__(base, rank, dropout)
        self.r = nn.Parameter(torch.zeros(rank, rank))

    def middle(self) -> Tensor:
        return self.r

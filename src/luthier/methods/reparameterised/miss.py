"""MiSS: one matrix for each site, which all shards of the input share.

    y = x W^T + b + D (x_1 + x_2 + ...)      D: (d_out, rank)    x_k: the k-th run of `rank` numbers of x

D starts at zero, so the tuned model starts as the base model. Where rank does not divide the inputs, the last shard is
filled up with zeros.

Kang, Yin 2024, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv:2409.15371
(first known as Bone). The form is that of peft 0.21. It is exactly a LoRA of this rank whose A is ones and zeros and
frozen, and is computed as one.

Count: sum over sites of rank * d_out.
Claims: LoRA's quality with half its numbers, and faster, since nothing is multiplied on the way in.
Use it when: LoRA's memory or time is what limits the run.
Not when: the inputs' order means nothing that a sum over shards could keep.
Pitfalls: peft's variants `bat` and `mini` compute something else and are refused when read.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("miss", family="reparameterised", paper="arXiv:2409.15371")
@dataclass(frozen=True, kw_only=True)
class MiSS(AtProjections):
    """Settings of MiSS."""

    rank: Annotated[int, "numbers in a shard", at_least(1)] = 64
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 5, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "MISS",
        {"miss_block": "block"},
        {"r": "rank"},
        {"init_weights": True},
        ignored=("miss_dropout", "mini_r"),
        transposed=False,
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            if self.rank > site.d_in:
                raise ConfigError(f"miss.rank: {self.rank} is above the {site.d_in} inputs of {site.key}. Use less.")
        return sites

    def params_at(self, site: Site) -> int:
        return self.rank * site.d_out

    def build(self, site: Site, base: Base) -> Attachment:
        return SharedShard(site.d_in, site.d_out, self.rank, self.dropout)


class SharedShard(Thin):
    """Adds `D` times the sum of the shards of x. block: D transposed, (rank, d_out)."""

    which: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, dropout: float) -> None:
        super().__init__(1.0, dropout)
        self.block = nn.Parameter(torch.zeros(rank, d_out))
        which = torch.eye(rank).repeat(1, -(-d_in // rank))[:, :d_in]
        self.register_buffer("which", which.contiguous(), persistent=False)

    def thin(self) -> tuple[Tensor, Tensor]:
        return self.which.to(self.block.dtype), self.block.T

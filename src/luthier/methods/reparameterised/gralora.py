"""GraLoRA: a grid of small LoRAs, one for each pair of a part of the input and a part of the output.

    y_j = (x W^T + b)_j + s sum_i B_ji A_ij x_i      A_ij: (rank / k, d_in / k)    B_ji: (d_out / k, rank / k)

B starts at zero, so the tuned model starts as the base model. s = alpha / rank.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", arXiv:2505.20355. The
form is that of peft 0.21 without its hybrid part. It is computed as one thin product of inner width k rank.

Count: as LoRA, sum over sites of rank * (d_in + d_out).
Claims: rank up to k times LoRA's at the same size; an outlier among the inputs disturbs only the blocks that read it.
Use it when: LoRA stops getting better with larger ranks.
Not when: the rank is small: each block has rank / k of it.
Pitfalls: k must divide the rank and both widths.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least, between
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("gralora", family="reparameterised", paper="arXiv:2505.20355")
@dataclass(frozen=True, kw_only=True)
class GraLoRA(AtProjections):
    """Settings of GraLoRA."""

    rank: Annotated[int, "of all blocks in a row of the grid together", at_least(1)] = 32
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 64.0
    k: Annotated[int, "parts that inputs and outputs are cut into", at_least(1)] = 2
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 4}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "GRALORA",
        {"gralora_A": "a", "gralora_B": "b"},
        {"r": "rank", "alpha": "alpha", "gralora_k": "k"},
        {"hybrid_r": 0},
        ignored=("gralora_dropout",),
    )

    def __post_init__(self) -> None:
        if self.rank % self.k:
            raise ConfigError(
                f"gralora.rank: {self.rank} is no multiple of k = {self.k}; use {-(-self.rank // self.k) * self.k}."
            )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.k, "gralora.k", site, "d_out", "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return Grid(site.d_in // self.k, site.d_out // self.k, self.rank, self.k, self.alpha / self.rank, self.dropout)


class Grid(Thin):
    """Adds the grid of small LoRAs. a: (k, d_in / k, rank), by input; b: (k, rank, d_out / k), by output."""

    def __init__(self, d_in: int, d_out: int, rank: int, k: int, scale: float, dropout: float) -> None:
        super().__init__(scale, dropout)
        self.k = k
        drawn = torch.empty(k, rank, d_in).uniform_(-1, 1) / math.sqrt(d_in)
        self.a = nn.Parameter(drawn.transpose(1, 2).contiguous())  # (k, d_in / k, rank)
        self.b = nn.Parameter(torch.zeros(k, rank, d_out))

    def thin(self) -> tuple[Tensor, Tensor]:
        k, (_, d_in, rank), d_out = self.k, self.a.shape, self.b.shape[2]
        one = torch.eye(k, dtype=self.a.dtype, device=self.a.device)
        # Inner numbers are (part of the input, part of the output, rank / k).
        a = torch.einsum("nm,nir->nrmi", one, self.a).reshape(k * rank, k * d_in)
        b = torch.einsum("jl,jnso->jonls", one, self.b.view(k, k, rank // k, d_out))
        return a, b.reshape(k * d_out, k * rank)

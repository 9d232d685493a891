"""DEFT: take a subspace of the outputs out of the weight, and put something learnt in its place.

    W' = (I - P p^T) W + P R      p = relu(P), or P and p both the orthonormal basis of P      P: (d_out, rank)

R: (rank, d_in) starts at p^T W, so that what is put in is what was taken out: the tuned model starts as the base model.

Kumar et al. 2025, "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models", arXiv:2509.22793. The form is
that of peft 0.21 with its start at the base; its random start, and PaRa, which only takes out, are not built.

Count: sum over sites of rank (d_in + d_out).
Claims: learns a new thing with less loss of the old ones than LoRA, in image models.
Use it when: something is to be replaced rather than added.
Not when: time is short: p^T W is made in every pass.
Pitfalls: the base weight is read in every pass, so a quantised base is refused; P moves what is taken out, and R no
longer undoes it.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.low_rank import Thin
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("deft", family="reparameterised", paper="arXiv:2509.22793")
@dataclass(frozen=True, kw_only=True)
class DEFT(AtProjections):
    """Settings of DEFT."""

    rank: Annotated[int, "directions taken out and put in", at_least(1)] = 8
    basis: Annotated[Literal["relu", "qr"], "what is taken out; qr: an orthogonal projection"] = "relu"
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 3, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "DEFT",
        {"deft_P": "p", "deft_R": "r"},
        {"r": "rank", "decomposition_method": "basis"},
        {"para": False, "alpha": None},
        ignored=("deft_dropout", "init_scale"),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            if self.rank > site.d_out:
                raise ConfigError(f"deft.rank: {self.rank} is above the {site.d_out} outputs of {site.key}. Lower it.")
        return sites

    def params_at(self, site: Site) -> int:
        return self.rank * (site.d_in + site.d_out)

    def build(self, site: Site, base: Base) -> Attachment:
        return Replaced(base, site.d_in, site.d_out, self.rank, self.basis, self.dropout)


class Replaced(Thin):
    """Adds `P (R - p^T W) x`."""

    reads_base_weight = True

    def __init__(self, base: Base, d_in: int, d_out: int, rank: int, basis: str, dropout: float) -> None:
        super().__init__(1.0, dropout)
        self.base, self.basis = base, basis
        self.p = nn.Parameter(torch.randn(d_out, rank) * 0.02)
        self.r = nn.Parameter(torch.empty(rank, d_in))
        with torch.no_grad():
            self.r.copy_(self.taken()[0])

    def taken(self) -> tuple[Tensor, Tensor]:
        """p^T W: (rank, d_in) and P: (d_out, rank)."""
        p = torch.linalg.qr(self.p)[0] if self.basis == "qr" else self.p
        out = p if self.basis == "qr" else p.relu()
        return out.T @ self.base.weight().to(p.dtype), p

    def thin(self) -> tuple[Tensor, Tensor]:
        taken, p = self.taken()
        return self.r - taken, p

"""PSOFT: turn the weight inside the subspace of its largest singular values, and leave the rest as it is.

    y = x W^T + b + B (diag(o) R diag(i) - I) A x      B A = U_r S_r V_r^T, A = V_r^T, of W = U S V^T

    R = (I + Q)(I - Q)^-1, Q = -Q^T      A: (rank, d_in)    B: (d_out, rank)    i, o: (rank,)

Q starts at zero and i and o at one, so the tuned model starts as the base model. A and B are frozen.

Wu et al. 2025, "Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation", arXiv:2505.11235. The form is
that of peft 0.21 with its exact decomposition; peft's alpha cancels out of it and is no setting here. Where peft makes
A and B again from the weight, ours keeps them in its file: their signs are free, and another machine may choose others.

Count: sum over sites of rank (rank - 1) / 2, and 2 rank more with stretch. The file holds A and B too.
Claims: keeps the angles between the main directions, as OFT does, at LoRA's cost in time.
Use it when: OFT is wanted, and its memory is not there.
Not when: the change must reach directions that the weight hardly has.
Pitfalls: with stretch the angles are kept only nearly; a base other than the one it was made on is refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.orthogonal import cayley, skew
from luthier.methods.parts.principal import FrozenFrame, check_principal, frame_params
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


def _stretch(facts: Mapping[str, Any]) -> dict[str, Any]:
    given = {bool(facts.get(key, True)) for key in ("psoft_mag_a", "psoft_mag_b")}
    if len(given) > 1:
        raise ConfigError("psoft_mag_a and psoft_mag_b differ; ours has both or neither.")
    return {"stretch": given.pop()}


@METHODS.register("psoft", family="reparameterised", paper="arXiv:2505.11235")
@dataclass(frozen=True, kw_only=True)
class PSOFT(AtProjections):
    """Settings of PSOFT."""

    rank: Annotated[int, "directions of the weight that are turned", at_least(2)] = 32
    stretch: Annotated[bool, "also scale each direction, before and after the turn"] = True
    dropout: Annotated[float, "share of the branch's input dropped in training", between(0, 0.99)] = 0.0

    start_is_drawn: ClassVar[bool] = False
    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, float]] = {"rank": 6, "lr": 2e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "PSOFT",
        {"psoft_R.weight": "q", "psoft_R.vector_a": "inward", "psoft_R.vector_b": "outward"},
        {"r": "rank"},
        {"ab_svd_init": "psoft_init", "psoft_svd": "full", "psoft_orth": True, "use_cayley_neumann": False},
        ignored=("psoft_dropout", "psoft_alpha", "psoft_svd_lowrank_niter", "random_seed", "num_cayley_neumann_terms",
                 "cayley_neumann_eps"),
        write=lambda method: {
            "psoft_alpha": method.rank, "psoft_mag_a": method.stretch, "psoft_mag_b": method.stretch,
        },
        read=_stretch,
        also=("psoft_mag_a", "psoft_mag_b"),
    )  # fmt: skip

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        return check_principal(self.rank, sites, "psoft.rank")

    def params_at(self, site: Site) -> int:
        return self.rank * (self.rank - 1) // 2 + 2 * self.rank * self.stretch

    def n_stored(self, anatomy: Anatomy) -> int:
        return self.n_params(anatomy) + frame_params(self.rank, self.places(anatomy))

    def build(self, site: Site, base: Base) -> Attachment:
        return TurnedSubspace(base, self.rank, self.dropout, stretch=self.stretch)


class TurnedSubspace(FrozenFrame):
    """R is diag(o) R diag(i) - I, of the turn, with all of the singular values in B."""

    def __init__(self, base: Base, rank: int, dropout: float, *, stretch: bool) -> None:
        super().__init__(base, rank, dropout, even=False)
        self.q = nn.Parameter(torch.zeros(rank * (rank - 1) // 2))
        self.inward = nn.Parameter(torch.ones(rank)) if stretch else None
        self.outward = nn.Parameter(torch.ones(rank)) if stretch else None

    def middle(self) -> Tensor:
        rank = len(self.a)
        turn = cayley(-skew(self.q[None], rank))[0]  # (rank, rank); the minus is peft's direction
        if self.inward is not None and self.outward is not None:
            turn = self.outward[:, None] * turn * self.inward
        return turn - torch.eye(rank, dtype=turn.dtype, device=turn.device)

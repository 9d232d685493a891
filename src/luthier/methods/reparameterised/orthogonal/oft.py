"""OFT: turn what a layer reads, block by block, by rotations that are learned; the weight's geometry stays.

    y = (x R) W^T + b      R = diag(R_1, ..., R_n)      R_k = (I - Q_k) (I + Q_k)^-1      Q_k = -Q_k^T: (block, block)

Q starts at zero and R at the identity, so the tuned model starts as the base model.

Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", arXiv:2306.07280, sections 3 and 4.
The input is turned, as in peft, which is W' = W R^T. `constraint` is the paper's COFT: |Q_k| stays below it, divided by
the root of their number, after every step.

Count: sum over sites of (d_in / block) block (block - 1) / 2.
Claims: keeps the angles between the rows of a weight, and so what the model knows, better than an added update.
Use it when: little data, and what the base can do must survive.
Not when: a step's time counts: every pass turns the input, one small product for each block.
Pitfalls: a cut Neumann series is no rotation, and peft's turns the other way round (`terms` computes it, to read such
files; 0 is exact); blocks must divide the inputs; no magnitude is learned, only directions.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.orthogonal import cayley, cayley_series, skew, turn_blocks
from luthier.methods.parts.own_tensors import own_modules
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm, TunedView


def _read(facts: Any) -> dict[str, Any]:
    series = facts.get("num_cayley_neumann_terms", 5) if facts.get("use_cayley_neumann", True) else 0
    return {"terms": series, "constraint": facts.get("eps", 6e-5) if facts.get("coft") else 0.0}


@METHODS.register("oft", family="reparameterised", paper="arXiv:2306.07280")
@dataclass(frozen=True, kw_only=True)
class OFT(AtProjections):
    """Settings of OFT."""

    block: Annotated[int, "side of a rotation: a divisor of d_in", at_least(2)] = 32
    constraint: Annotated[float, "bound of the change in all blocks together (COFT); 0: none", at_least(0)] = 0.0
    terms: Annotated[int, "terms of peft's Neumann series; 0: exact", at_least(0)] = 0

    default_lr: ClassVar[float] = 2e-3
    tiny: ClassVar[dict[str, float]] = {"block": 8, "lr": 1e-2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "OFT",
        {"oft_R.weight": "q"},
        {"oft_block_size": "block"},
        {"block_share": False, "r": 0},
        ignored=("module_dropout",),
        write=lambda m: {
            "use_cayley_neumann": m.terms > 0,
            "num_cayley_neumann_terms": m.terms or 5,
            **({"peft_version": "0.18.0"} if m.terms else {}),  # the first whose series is this one
            "coft": m.constraint > 0,
            "eps": m.constraint or 6e-5,
        },
        read=_read,
        also=("use_cayley_neumann", "num_cayley_neumann_terms", "coft", "eps"),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.block, "oft.block", site, "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        return site.d_in // self.block * (self.block * (self.block - 1) // 2)

    def build(self, site: Site, base: Base) -> Attachment:
        return Rotation(site.d_in // self.block, self.block, self.terms)

    def on_step(self, tuned: TunedView, step: int, total: int) -> None:
        if self.constraint:
            for module in own_modules(self, tuned, Rotation):
                module.bound(self.constraint)


class Rotation(Attachment):
    """Turns what the layer reads by a rotation for each block of it."""

    kind = "delta"

    def __init__(self, n: int, side: int, terms: int) -> None:
        super().__init__()
        self.side, self.terms = side, terms
        self.q = nn.Parameter(torch.zeros(n, side * (side - 1) // 2))

    def rotations(self) -> Tensor:
        """R_k, (n, side, side)."""
        q = skew(self.q, self.side)
        return cayley_series(q, self.terms) if self.terms else cayley(q)

    def before(self, x: Tensor) -> Tensor:
        return turn_blocks(x, self.rotations().to(x.dtype))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return turn_blocks(weight, self.rotations().transpose(1, 2).to(weight.dtype)), bias

    @torch.no_grad()
    def bound(self, size: float) -> None:
        """Shorten each Q_k to size / sqrt(n) where it is longer."""
        length = torch.linalg.vector_norm(self.q, dim=1, keepdim=True) * 2**0.5  # each entry stands in Q twice
        self.q.mul_((size / len(self.q) ** 0.5 / length.clamp_min(1e-30)).clamp_max(1.0))

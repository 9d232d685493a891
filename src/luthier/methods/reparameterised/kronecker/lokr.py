"""LoKr: the update is a Kronecker product, of which the larger factor, or both, may be a thin product.

    y = x W^T + b + s (C (x) D) x      C: (f, f')    D: (d_out / f, d_in / f') = D_a D_b    s = alpha / rank

f and f' are divisors of d_out and d_in. D is D_a D_b, of width `rank`, where that is smaller than half of D's larger
side, else D itself; so is C with `both`. C starts at zero (its first half, where it is a product), so the tuned model
starts as the base model.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
arXiv:2309.14859, section 4. The scale is alpha / rank always, as in peft; LyCORIS takes 1 where neither factor is thin.
`luthier export --to lycoris` writes its files, `luthier import` reads them, with what lies between the two scales in C.

Count: sum over sites of f f' + rank (d_out / f + d_in / f'), or their whole matrices where these are no thin products.
Claims: high rank at a size below LoRA's; smooth between LoRA (factor 1) and KronA (large ranks).
Use it when: many tunings are kept, and each must be small.
Not when: a site's widths have no factors near their roots.
Pitfalls: a factor that is no divisor is refused here, where peft quietly takes a smaller one; with neither factor thin
the rank has no meaning but in the scale.
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import above, at_least
from luthier.methods.parts.kronecker import KroneckerUpdate, check_divides, near_square
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("lokr", family="reparameterised", paper="arXiv:2309.14859")
@dataclass(frozen=True, kw_only=True)
class LoKr(AtProjections):
    """Settings of LoKr."""

    rank: Annotated[int, "inner width of the factors that are thin products", at_least(1)] = 8
    alpha: Annotated[float, "the update is scaled by alpha / rank", above(0)] = 8.0
    factor: Annotated[int, "side of C, a divisor of both widths; 0: those nearest their roots", at_least(0)] = 0
    both: Annotated[bool, "C may be a thin product too"] = False

    default_lr: ClassVar[float] = 5e-3
    tiny: ClassVar[dict[str, int]] = {"rank": 2}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "LOKR",
        {f"lokr_w{n}{end}": f"{ours}{end}" for n, ours in ((1, "c"), (2, "d")) for end in ("", "_a", "_b")},
        {"r": "rank", "alpha": "alpha", "decompose_both": "both"},
        ignored=("rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"),
        transposed=False,
        write=lambda method: {"decompose_factor": method.factor or -1},
        read=lambda facts: {"factor": max(0, facts.get("decompose_factor", -1))},
        also=("decompose_factor",),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.factor or 1, "lokr.factor", site, "d_out", "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        c, d = self._shapes(site)
        return sum(self.rank * sum(shape) if thin else math.prod(shape) for shape, thin in (c, d))

    def build(self, site: Site, base: Base) -> Attachment:
        (c, thin_c), (d, thin_d) = self._shapes(site)
        return SmallFactors(c, d, self.rank if thin_c else 0, self.rank if thin_d else 0, self.alpha / self.rank)

    def _shapes(self, site: Site) -> tuple[tuple[tuple[int, int], bool], tuple[tuple[int, int], bool]]:
        """The shapes of C and D, each with whether it is a thin product."""
        outer = [self.factor or near_square(width)[0] for width in (site.d_out, site.d_in)]
        c, d = (outer[0], outer[1]), (site.d_out // outer[0], site.d_in // outer[1])
        return (c, self.both and self.rank < max(c) / 2), (d, self.rank < max(d) / 2)


class SmallFactors(KroneckerUpdate):
    """Adds `scale * (C (x) D) x`. A factor is held whole under its own name, or as its two halves."""

    def __init__(self, c: tuple[int, int], d: tuple[int, int], rank_c: int, rank_d: int, scale: float) -> None:
        super().__init__(scale)
        for name, (rows, columns), rank in (("c", c, rank_c), ("d", d, rank_d)):
            shapes = {f"{name}_a": (rows, rank), f"{name}_b": (rank, columns)} if rank else {name: (rows, columns)}
            for full, shape in shapes.items():
                value = torch.zeros(shape)
                if full not in ("c", "c_a"):
                    nn.init.kaiming_uniform_(value, a=math.sqrt(5))
                self.register_parameter(full, nn.Parameter(value))

    def factors(self) -> tuple[Tensor, Tensor]:
        return self._whole("c"), self._whole("d")

    def _whole(self, name: str) -> Tensor:
        held = dict(self.named_parameters())
        return held[name] if name in held else held[f"{name}_a"] @ held[f"{name}_b"]

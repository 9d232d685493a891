"""WaveFT: train a few wavelet coefficients of the update, at places drawn once.

    y = x W^T + b + alpha IDWT2(F) x      F: (d_out, d_in), zero but for `n` trained coefficients

IDWT2 is one level of the inverse Haar transform; the quarters of F are its averages and its differences along rows,
columns and both. The coefficients start at zero, so the tuned model starts as the base model.

Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets", arXiv:2505.12532. The form
is that of peft 0.21 with its default wavelet; places follow from `draw` and the shape, and are not stored. With
transform=false the places are entries of the update itself, as a control without wavelets.

Count: n for each site.
Claims: better than FourierFT and LoRA at very small sizes, since a wavelet changes a few entries and not all.
Use it when: thousands of tunings are kept.
Not when: memory or time is short: an update as large as the weight is made in every pass.
Pitfalls: other wavelets compute something else and are refused when read; odd widths are filled up by one.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("waveft", family="reparameterised", paper="arXiv:2505.12532")
@dataclass(frozen=True, kw_only=True)
class WaveFT(AtProjections):
    """Settings of WaveFT."""

    n: Annotated[int, "trained coefficients of each site", at_least(1)] = 2592
    alpha: Annotated[float, "multiplies the update", above(0)] = 25.0
    draw: Annotated[int, "which places: any whole number", at_least(0)] = 777
    transform: Annotated[bool, "the coefficients are a wavelet's, and not entries of the update"] = True

    default_lr: ClassVar[float] = 1e-3
    tiny: ClassVar[dict[str, int]] = {"n": 60}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "WAVEFT",
        {"waveft_spectrum": "c"},
        {"n_frequency": "n", "scaling": "alpha", "random_loc_seed": "draw", "use_idwt": "transform"},
        {"wavelet_family": "db1", "proportional_parameters": False},
        silent=("n_frequency_pattern",),
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            if self.n > site.d_in * site.d_out:
                raise ConfigError(
                    f"waveft.n: {self.n} coefficients are more than the {site.d_in * site.d_out} of {site.key}. "
                    "Set it below that."
                )
        return sites

    def params_at(self, site: Site) -> int:
        return self.n

    def build(self, site: Site, base: Base) -> Attachment:
        return SparseWavelets(site.d_in, site.d_out, self.n, self.alpha, self.draw, transform=self.transform)


def inverse_haar(f: Tensor) -> Tensor:
    """One level of the inverse two-dimensional Haar transform. (even rows, even columns), of four quarters."""
    rows, columns = f.shape[0] // 2, f.shape[1] // 2
    average, along, across, both = f[:rows, :columns], f[:rows, columns:], f[rows:, :columns], f[rows:, columns:]
    quads = [
        [average + along + across + both, average + along - across - both],
        [average - along + across - both, average - along - across + both],
    ]
    joined = torch.stack([torch.stack(pair, -1) for pair in quads], 1)  # (rows, 2, columns, 2)
    return joined.reshape(2 * rows, 2 * columns) / 2


class SparseWavelets(DenseUpdate):
    """Adds `alpha IDWT2(F) x`, F holding the n coefficients."""

    index: Tensor

    def __init__(self, d_in: int, d_out: int, n: int, alpha: float, draw: int, *, transform: bool) -> None:
        super().__init__()
        self.shape, self.alpha, self.transform = (d_out, d_in), alpha, transform
        self.c = nn.Parameter(torch.zeros(n))
        places = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(draw), device="cpu")[:n]
        self.register_buffer("index", places.clone(), persistent=False)

    def update(self) -> Tensor:
        rows, columns = self.shape
        f = torch.zeros(rows * columns, device=self.c.device, dtype=self.c.dtype)
        f = f.index_copy(0, self.index, self.c).view(rows, columns)
        if self.transform:
            f = inverse_haar(nn.functional.pad(f, (0, columns % 2, 0, rows % 2)))[:rows, :columns]
        return f * self.alpha

"""FourierFT: train a few coefficients of the update's two-dimensional Fourier transform, at places drawn once.

    y = x W^T + b + U x      U = alpha Re(IDFT2(F))      F: (d_out, d_in), zero but for `n` trained coefficients

The coefficients start at zero, so the tuned model starts as the base model; with start="normal" as the paper draws them
it does not. The places follow from `draw` and the shape, are those of peft, and are not stored.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", arXiv:2405.03003, section 3.

Count: n for each site.
Claims: LoRA's quality with a hundredth of its numbers.
Use it when: thousands of tunings are kept.
Not when: memory or time is short: an update as large as the weight is made by an FFT in every pass.
Pitfalls: an FFT in half precision; places drawn anew for every layer are not FourierFT; rates ten times LoRA's, since
the transform divides by d_in d_out.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import ConfigError, above, at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("fourierft", family="reparameterised", paper="arXiv:2405.03003")
@dataclass(frozen=True, kw_only=True)
class FourierFT(AtProjections):
    """Settings of FourierFT."""

    n: Annotated[int, "trained coefficients of each site", at_least(1)] = 1000
    alpha: Annotated[float, "multiplies the update", above(0)] = 150.0
    draw: Annotated[int, "which places: any whole number", at_least(0)] = 777
    start: Annotated[Literal["zero", "normal"], "where the coefficients start"] = "zero"

    default_lr: ClassVar[float] = 5e-2
    tiny: ClassVar[dict[str, int]] = {"n": 40}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "FOURIERFT",
        {"fourierft_spectrum": "c"},
        {"n_frequency": "n", "scaling": "alpha", "random_loc_seed": "draw"},
        silent=("n_frequency_pattern",),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "starts_at_base", self.start == "zero")

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            if self.n > site.d_in * site.d_out:
                raise ConfigError(
                    f"fourierft.n: {self.n} coefficients are more than the {site.d_in * site.d_out} of {site.key}. "
                    "Set it below that; 1000 is usual."
                )
        return sites

    def params_at(self, site: Site) -> int:
        return self.n

    def build(self, site: Site, base: Base) -> Attachment:
        return SparseSpectrum(site.d_in, site.d_out, self.n, self.alpha, self.draw, drawn=self.start == "normal")


class SparseSpectrum(DenseUpdate):
    """Adds `alpha Re(IDFT2(F)) x`, F holding the n coefficients."""

    index: Tensor

    def __init__(self, d_in: int, d_out: int, n: int, alpha: float, draw: int, *, drawn: bool) -> None:
        super().__init__()
        self.shape, self.alpha = (d_out, d_in), alpha
        self.c = nn.Parameter(torch.randn(n) if drawn else torch.zeros(n))
        places = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(draw), device="cpu")[:n]
        self.register_buffer("index", places.clone(), persistent=False)

    def update(self) -> Tensor:
        spectrum = torch.zeros(self.shape[0] * self.shape[1], device=self.c.device, dtype=self.c.dtype)
        spectrum = spectrum.index_copy(0, self.index, self.c).view(self.shape)
        found: Tensor = torch.fft.ifft2(spectrum).real
        return found * self.alpha

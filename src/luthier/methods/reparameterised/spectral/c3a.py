"""C3A: the update is a grid of circulant blocks: each convolves a part of the input in a circle.

    y_m = (x W^T + b)_m + (1 / d_in) sum_n C_mn x_n      C_mn[t, s] = c_mn[(s - t) mod block]      c_mn: (block,)

c starts at zero, so the tuned model starts as the base model.

Chen A. et al. 2024, "Parameter-Efficient Fine-Tuning via Circular Convolution", arXiv:2407.19342. The form is that of
peft 0.21, which draws c by default and so starts elsewhere. There the gradient of what the layer reads is that of the
mirrored kernel (tests/methods/test_peft_relatives.py): layers below learn from another function than the one computed.

Count: sum over sites of d_in d_out / block.
Claims: rank up to that of the weight from few numbers.
Cost: an update as large as the weight is made in every pass.
Use it when: a low rank is what holds LoRA back, and the tuning must be small.
Not when: widths have no large common divisor.
Pitfalls: the division by d_in asks for rates far above LoRA's; the block must divide both widths.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import at_least
from luthier.methods.parts.dense import DenseUpdate
from luthier.methods.parts.kronecker import check_divides
from luthier.methods.parts.projections import AtProjections
from luthier.surgery import METHODS, Attachment, Base, PeftForm


@METHODS.register("c3a", family="reparameterised", paper="arXiv:2407.19342")
@dataclass(frozen=True, kw_only=True)
class C3A(AtProjections):
    """Settings of C3A."""

    block: Annotated[int, "side of a circulant block: a divisor of both widths", at_least(1)] = 128

    default_lr: ClassVar[float] = 1e-1
    tiny: ClassVar[dict[str, float]] = {"block": 8, "lr": 3e-1}
    peft: ClassVar[PeftForm | None] = PeftForm(
        "C3A", {"c3a_kernel": "c"}, {"block_size": "block"}, silent=("block_size_pattern",), transposed=False
    )

    def places(self, anatomy: Anatomy) -> tuple[Site, ...]:
        sites = super().places(anatomy)
        for site in sites:
            check_divides(self.block, "c3a.block", site, "d_out", "d_in")
        return sites

    def params_at(self, site: Site) -> int:
        return site.d_in * site.d_out // self.block

    def build(self, site: Site, base: Base) -> Attachment:
        return Circulant(site.d_in // self.block, site.d_out // self.block, self.block)


class Circulant(DenseUpdate):
    """Adds the grid of circulant blocks, divided by d_in."""

    def __init__(self, columns: int, rows: int, block: int) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.zeros(rows, columns, block))

    def update(self) -> Tensor:
        rows, columns, block = self.c.shape
        # Windows of c written twice, (rows, columns, t, s): picked entries take twice as long, backwards by a scatter.
        blocks = torch.cat([self.c, self.c], -1).unfold(-1, block, 1)[..., 1:, :].flip(-2)
        return blocks.transpose(1, 2).reshape(rows * block, columns * block) / (columns * block)

"""A learned number for each that a layer gives, or reads; it starts at one."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from luthier.kernels import GroupedScales, scale
from luthier.surgery import Attachment, Base

__all__ = ["RescaleInput", "RescaleOutput", "Scales"]


class Scales(Attachment):
    """The numbers."""

    kind = "scale"
    scale: nn.Parameter

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))


class RescaleOutput(Scales):
    """Multiplies what a layer gives, element by element."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return scale(y, self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[:, None], bias * self.scale if bias is not None else None

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if base.site.rows is not None or base.site.expert is not None or base.site.kind.endswith("_out"):
            return None
        y: Tensor = base.module(x)
        return scale(y, self.scale)

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> GroupedScales:
        return GroupedScales([m.scale for m in members if isinstance(m, RescaleOutput)], dtype, inputs=False)


class RescaleInput(Scales):
    """Multiplies what a layer reads, element by element."""

    def before(self, x: Tensor) -> Tensor:
        return scale(x, self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight * self.scale[None, :], bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        if base.site.rows is not None or base.site.expert is not None:
            return None
        y: Tensor = base.module(scale(x, self.scale))
        return y

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> GroupedScales:
        return GroupedScales([m.scale for m in members if isinstance(m, RescaleInput)], dtype, inputs=True)

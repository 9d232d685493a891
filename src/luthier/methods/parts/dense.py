"""An update that is as large as the weight, made anew from few numbers at every pass."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.methods.parts.low_rank import fusable
from luthier.surgery import Attachment, Base

__all__ = ["DenseUpdate"]


class DenseUpdate(Attachment):
    """Adds `U x` to the output; `update()` says what U is, and all else follows."""

    kind = "delta"

    def update(self) -> Tensor:
        """U: (d_out, d_in), with the graph of what it is made of."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + F.linear(x, self.update())

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.update(), bias

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        whole = self._whole(base)
        return None if whole is None else F.linear(x, whole, base.bias())

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        whole, bias = self._whole(base), base.bias()
        return None if whole is None else lambda x: F.linear(x, whole.detach(), bias)

    def _whole(self, base: Base) -> Tensor | None:
        """W + U, in place of two products one; only in full precision, where a small U is not lost in the sum."""
        if not fusable(base) or torch.is_autocast_enabled(base.device.type):
            return None
        weight, update = base.weight(), self.update()
        return weight + update if weight.dtype == update.dtype and weight.dtype.itemsize >= 4 else None

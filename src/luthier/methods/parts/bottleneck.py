"""The bottleneck of adapters: narrow, bend, widen, and add.

    y + factor * (W_u σ(W_d x + b_d) + b_u)          W_d: (width, d)    W_u: (d, width)

It adds to `y`; what it reads, and what y is, the method says.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Site, is_sublayer
from luthier.core import AnatomyError
from luthier.surgery import Attachment

__all__ = ["Activation", "Bottleneck", "activated", "bottleneck_params", "check_sublayers", "width_of"]

Activation = Literal["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"]


def width_of(site: Site) -> int:
    """Width of the stream that a sublayer site reads and gives; its `d_in` is that of the sublayer's last layer."""
    return site.d_out


def check_sublayers(sites: tuple[Site, ...], asked_by: str) -> tuple[Site, ...]:
    """Hand `sites` back if an adapter can close, or stand beside, all of them.

    Raises:
        AnatomyError: one of them is not what a sublayer gives.
    """
    for site in sites:
        if not is_sublayer(site):
            raise AnatomyError(
                f"{asked_by}.sites: {site.key} is not what a sublayer gives. Use attn_out, ffn_out or cross_out."
            )
    return sites


def bottleneck_params(sites: tuple[Site, ...], width: int) -> int:
    """2 d r + r + d for each site."""
    return sum(2 * width_of(s) * width + width + width_of(s) for s in sites)


class Bottleneck(Attachment):
    """The two linear layers. Subclasses say what x and y are; biases start at zero."""

    def __init__(self, d: int, width: int, activation: Activation, dropout: float = 0.0) -> None:
        super().__init__()
        self.activation = activation
        self.down = nn.Linear(d, width)
        self.up = nn.Linear(width, d)
        self.dropout = nn.Dropout(dropout)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def add(self, y: Tensor, x: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """`y + factor * bottleneck(x)`; x, y: (..., d), `factor` a number or anything that multiplies y's shape."""
        if isinstance(factor, float) and not (self.training and self.dropout.p > 0):
            down, up = self.down, self.up
            return kernels.bottleneck(y, x, down.weight, down.bias, up.weight, up.bias, factor, self.activation)
        out: Tensor = y + factor * self.up(self.dropout(_ACT[self.activation](self.down(x))))
        return out


def activated(activation: Activation, h: Tensor) -> Tensor:
    """σ(h), of the name."""
    return _ACT[activation](h)


_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda h: nn.functional.gelu(h, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}

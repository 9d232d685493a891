"""The bottleneck of adapters: narrow, bend, widen, and add.

    y + factor * (W_u σ(W_d x + b_d) + b_u)          W_d: (width, d)    W_u: (d, width)

It adds to `y`; what it reads, and what y is, the method says.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy import Site, is_sublayer
from luthier.core import AnatomyError
from luthier.methods.parts.own_tensors import group_names, own_modules, own_unfrozen
from luthier.surgery import Attachment, Group, Method, TunedView

__all__ = [
    "Activation",
    "Bottleneck",
    "activated",
    "biases_rest",
    "bottleneck_params",
    "check_sublayers",
    "width_of",
    "without_units",
]

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

    @torch.no_grad()
    def resize(self, width: int, kept: Tensor | None = None) -> None:
        """Another width: that of the units where `kept` is true; without it, for numbers that are put there next."""
        places = torch.arange(width) if kept is None else kept.nonzero().flatten()
        places = places.clamp(max=self.down.out_features - 1).to(self.down.weight.device)
        trains = self.down.weight.requires_grad
        weight, bias, wide = self.down.weight[places], self.down.bias[places], self.up.weight[:, places]
        self.down.weight, self.down.bias = nn.Parameter(weight, trains), nn.Parameter(bias, trains)
        self.up.weight = nn.Parameter(wide, trains)
        self.down.out_features = self.up.in_features = width

    def fit(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the width of what was stored, from which units may have been taken out."""
        width = len(tensors["down.bias"]) if "down.bias" in tensors else self.down.out_features
        if width < self.down.out_features:
            self.resize(width)

    def add(self, y: Tensor, x: Tensor, factor: float | Tensor = 1.0) -> Tensor:
        """`y + factor * bottleneck(x)`; x, y: (..., d), `factor` a number or anything that multiplies y's shape."""
        if isinstance(factor, float) and not (self.training and self.dropout.p > 0):
            down, up = self.down, self.up
            return kernels.bottleneck(y, x, down.weight, down.bias, up.weight, up.bias, factor, self.activation)
        out: Tensor = y + factor * self.up(self.dropout(_ACT[self.activation](self.down(x))))
        return out


def biases_rest(method: Method, tuned: TunedView, kind: type[Bottleneck]) -> list[Group]:
    """Decay leaves alone the biases of its bottlenecks, and what of the model it trains in place: biases, norms."""
    biases = [layer.bias for m in own_modules(method, tuned, kind) for layer in (m.down, m.up)]
    in_place = [u.parameter for u in own_unfrozen(method, tuned)]
    return [Group(group_names(tuned, biases + in_place), weight_decay=0.0)]


def activated(activation: Activation, h: Tensor) -> Tensor:
    """σ(h), of the name."""
    return _ACT[activation](h)


@torch.no_grad()
def without_units(module: Bottleneck, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Take the units out of a bottleneck that read nothing, or of which nothing is read; it computes the same.

    A unit that reads nothing gives σ of its bias, whatever the text: that goes into the second layer's bias.

    Args:
        down, up: where the two matrices are not held at zero, (width, d) and (d, width).

    Returns:
        the two masks of what is left.
    """
    reads, read = down.any(1), up.any(0)
    kept = reads & read
    if not kept.any():
        kept[0] = True  # a layer of no width is none
    still = ~reads & read & ~kept
    constant = activated(module.activation, module.down.bias[still])
    module.up.bias.add_(module.up.weight[:, still] @ constant)
    module.resize(int(kept.sum()), kept)
    return down[kept], up[:, kept]


_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda h: h,
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda h: nn.functional.gelu(h, approximate="tanh"),
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}

"""The bottleneck that closes a sublayer: it reads what the sublayer gives, and adds to it."""

from typing import Literal

from torch import Tensor, nn

from luthier.methods.parts.bottleneck import Activation, Bottleneck

__all__ = ["Closing"]


class Closing(Bottleneck):
    """Adds a bottleneck of the sublayer's output to that output.

    init: paper, small normal weights; zero_up, the same and a second matrix of zeros; plain, a first matrix as
    nn.Linear draws it and a second of zeros.
    """

    kind = "sequential"
    needs_input = False

    def __init__(self, d: int, width: int, activation: Activation, init: Literal["paper", "zero_up", "plain"]) -> None:
        super().__init__(d, width, activation)
        for layer in (self.down, self.up) if init != "plain" else ():
            nn.init.trunc_normal_(layer.weight, std=1e-3, a=-2e-3, b=2e-3)
        if init != "paper":
            nn.init.zeros_(self.up.weight)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(y, y)

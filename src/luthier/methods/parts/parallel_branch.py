"""The branch beside a sublayer: shared by the parallel adapter and by the hybrids that hold one."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from luthier.methods.parts.bottleneck import Activation, Bottleneck

__all__ = ["Beside"]


class Beside(Bottleneck):
    """Adds `scale` times a bottleneck of the sublayer's input to the sublayer's output. Starts at zero."""

    kind = "parallel"

    def __init__(
        self,
        d: int,
        width: int,
        activation: Activation,
        *,
        scale: float,
        learn_scale: bool = False,
        dropout: float = 0.0,
        reads: Literal["input", "residual"] = "input",
    ) -> None:
        super().__init__(d, width, activation, dropout)
        self.reads = reads
        self.scale = nn.Parameter(torch.tensor(scale)) if learn_scale else scale
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(y, x, self.scale)

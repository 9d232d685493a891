"""In place of an optimiser: one vector of one tensor becomes that of a word, or nothing moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.runs.spec import OptimSpec
from luthier.surgery import Group
from luthier.training.optimiser import Descent

__all__ = ["WordExchange"]


class WordExchange(Descent):
    """Puts a vector into a row of the one trained tensor. There is no rate, and the gradient is for looking at.

    Attributes:
        exchange: row, id of the word, and its vector (d,), of the step that is being made; None where nothing changes.
    """

    must_move = False

    def __init__(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> None:
        super().__init__(named, groups, spec, lr)
        self.exchange: tuple[int, int, Tensor] | None = None

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for name, parameter in self.named.items():
            self.counts[name] += 1
            if self.exchange is not None:
                row, _, vector = self.exchange
                parameter[row] = vector
        self.updates += 1

    def zero_grad(self) -> None:
        super().zero_grad()
        self.exchange = None

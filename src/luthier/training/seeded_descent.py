"""Descent along directions that are named by seeds: no gradient is ever held, and no direction is kept."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from luthier.core import key
from luthier.runs.spec import OptimSpec
from luthier.surgery import Group
from luthier.training.optimiser import Descent

__all__ = ["SeededDescent"]


class SeededDescent(Descent):
    """p <- p - rate · (mean over seeds of slope · z(seed) + decay · (p - rest)),  z of normal numbers.

    A direction is drawn anew whenever it is wanted, tensor by tensor, so no more than one tensor of it is ever there.
    Draws are named by the seed and the tensor, in fp32, on the device of the tensor.

    Attributes:
        slopes: (seed, slope of the loss along it), of the step that is being made.
    """

    whole_gradient = False

    def __init__(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> None:
        super().__init__(named, groups, spec, lr)
        self.slopes: list[tuple[int, float]] = []

    def direction(self, seed: int) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        """What learns in this step, each tensor with its part of the direction."""
        for name, parameter in self.named.items():
            if parameter.requires_grad:
                generator = torch.Generator(parameter.device).manual_seed(key(seed, name))
                yield name, parameter, torch.randn(parameter.shape, generator=generator, device=parameter.device)

    @torch.no_grad()
    def shift(self, seed: int, by: float) -> None:
        """Move everything by `by` along a direction."""
        for _, parameter, z in self.direction(seed):
            parameter.add_(z, alpha=by)
            del z  # before the next is drawn

    def norm(self) -> float:
        """Of the slopes: with one seed its size, which is that of the gradient on average over directions."""
        return math.hypot(*(slope for _, slope in self.slopes)) / math.sqrt(max(1, len(self.slopes)))

    def has_gradient(self, parameter: Tensor) -> bool:
        return parameter.requires_grad and any(slope for _, slope in self.slopes)

    def gradient_bytes(self) -> int:
        return 0

    def clip(self, norm: float) -> None:
        if self.spec.clip > 0 and norm > self.spec.clip:
            self.slopes = [(seed, slope * self.spec.clip / norm) for seed, slope in self.slopes]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for number, (seed, slope) in enumerate(self.slopes):
            for name, parameter, z in self.direction(seed):
                rate, decay, rest = self._pace(name, factor)
                if number == 0:
                    self.counts[name] += 1
                    if decay:
                        parameter.mul_(1 - rate * decay).add_(rate * decay * rest)
                parameter.add_(z, alpha=-rate * slope / len(self.slopes))
                del z
        self.updates += 1

    def zero_grad(self) -> None:
        super().zero_grad()
        self.slopes = []

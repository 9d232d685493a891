"""The fast Walsh-Hadamard transform, and random projections made of it (Fastfood).

    P(z) = (H G Pi H B z)[:n] / sqrt(n sum G^2)       B: random signs    Pi: a permutation    G: Gaussian

H is the unnormalised transform of N = 2^k numbers; H is symmetric and H H = N. |P(z)| is |z| in expectation.

Le, Sarlós, Smola 2013, "Fastfood: Approximating Kernel Expansions in Loglinear Time", section 3.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core import key

__all__ = ["Projection", "hadamard"]


def hadamard(x: Tensor) -> Tensor:
    """H x over the last dimension, whose length is a power of two; unnormalised, so that H H x = N x."""
    out: Tensor = _Hadamard.apply(x)  # type: ignore[no-untyped-call]
    return out


class _Hadamard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n = x.shape[-1]
        out = x.clone()
        half = 1
        while half < n:
            pairs = out.view(*x.shape[:-1], n // (2 * half), 2, half)
            low, high = pairs[..., 0, :], pairs[..., 1, :]
            difference = low - high
            low.add_(high)
            high.copy_(difference)
            half *= 2
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # H is its own transpose: no factor may stand here.
        return hadamard(grad.contiguous())


class Projection(nn.Module):
    """z -> P(z), from (inputs,) to (outputs,). Nothing is stored: (seed, name) say which projection it is."""

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, inputs: int, outputs: int, *name: int | str) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        # A tensor shorter than z would see only its first numbers, so z is never cut: N follows the longer of the two.
        n = 1 << max(1, math.ceil(math.log2(max(inputs, outputs, 2))))
        draw = torch.Generator().manual_seed(key(*name))
        signs = torch.randint(2, (n,), generator=draw, dtype=torch.int8).mul_(2).sub_(1)
        order = torch.randperm(n, generator=draw, dtype=torch.int64)
        gauss = torch.randn(n, generator=draw)
        gauss /= float(torch.linalg.vector_norm(gauss, dtype=torch.float64)) * math.sqrt(outputs)
        for short, tensor in (("signs", signs), ("order", order.to(torch.int32)), ("gauss", gauss)):
            self.register_buffer(short, tensor, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (inputs,) -> (outputs,)."""
        padded = torch.nn.functional.pad(z * self.signs[: self.inputs], (0, len(self.signs) - self.inputs))
        mixed = hadamard(padded)[self.order]
        return hadamard(mixed * self.gauss)[: self.outputs]

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


# Entries of one factor's matrix a side. Few passes over memory want it large, few products want it small; 16, 32 and 64
# were timed (docs/speed-log.md).
_FACTOR = 32


def hadamard(x: Tensor) -> Tensor:
    """H x over the last dimension, whose length is a power of two; unnormalised, so that H H x = N x."""
    out: Tensor = _Hadamard.apply(x)  # type: ignore[no-untyped-call]
    return out


class _Hadamard(torch.autograd.Function):
    """H of N = a b c ... is the Kronecker product of those of a, b, c: each a small matrix product along its own axis.

    A fast transform by halves goes through memory log2 N times, this one log N / log a times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n = x.shape[-1]
        out, behind = x.reshape(-1, n), 1
        while behind < n:
            a = min(_FACTOR, n // behind)
            matrix = _matrix(a, x)
            out = out.reshape(-1, a, behind)
            out = matrix @ out if behind > 1 else out.view(-1, a) @ matrix
            behind *= a
        return out.reshape(x.shape).clone() if n == 1 else out.reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # H is its own transpose: no factor may stand here.
        return hadamard(grad.contiguous())


def _matrix(n: int, like: Tensor) -> Tensor:
    """H of n, (n, n)."""
    h = torch.ones(1, 1, dtype=like.dtype, device=like.device)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


class Projection(nn.Module):
    """z -> P(z), from (inputs,) to (outputs,). Nothing is stored: (seed, name) say which projection it is."""

    signs: Tensor
    order: Tensor
    gauss: Tensor

    def __init__(self, inputs: int, outputs: int, *name: int | str) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        # A tensor shorter than z would see only its first numbers, so z is never cut: N follows the longer of the two.
        n, self.mixed = _power(max(inputs, outputs)), _power(inputs)
        draw = torch.Generator().manual_seed(key(*name))
        signs = torch.randint(2, (n,), generator=draw, dtype=torch.int8).mul_(2).sub_(1)
        order = torch.randperm(n, generator=draw, dtype=torch.int64)
        gauss = torch.randn(n, generator=draw)
        if gauss.device.type != "meta":  # where shapes alone are asked for, there is no number to divide by
            gauss /= float(torch.linalg.vector_norm(gauss, dtype=torch.float64)) * math.sqrt(outputs)
        # Behind z there are only zeros, so H B z repeats itself from `mixed` on.
        held = (("signs", signs[:inputs].clone()), ("order", (order % self.mixed).to(torch.int32)), ("gauss", gauss))
        for short, tensor in held:
            self.register_buffer(short, tensor, persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """z: (inputs,) -> (outputs,)."""
        padded = torch.nn.functional.pad(z * self.signs, (0, self.mixed - self.inputs))
        mixed = hadamard(padded).index_select(0, self.order)
        return hadamard(mixed * self.gauss)[: self.outputs]


def _power(n: int) -> int:
    """The least power of two that is at least n, and 2."""
    return 1 << max(1, math.ceil(math.log2(max(n, 2))))

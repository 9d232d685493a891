"""Arithmetic that goes wrong and raises nothing: a gradient is computed twice, and both must agree to the bit.

Everything a step computes follows from numbers (rows, seed, step), so two passes differ only where the machine, or a
kernel that adds in no fixed order, has computed something else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

__all__ = ["differing", "explained"]


def differing(losses: list[float], parameters: Mapping[str, Tensor], again: Callable[[], list[float]]) -> list[str]:
    """Names of what a second pass gives otherwise: "loss of micro-batch N", or a trained tensor for its gradient.

    Args:
        losses: of the first pass, one for each micro-batch.
        parameters: hold the first pass's gradients; afterwards the second one's.
        again: makes the second pass, and gives its losses.
    """
    first = {n: p.grad.detach().clone() for n, p in parameters.items() if p.grad is not None}
    for parameter in parameters.values():
        parameter.grad = None
    second = again()
    # As text: NaN is not equal to itself, and an overflow that comes twice is no wrong arithmetic.
    found = [
        f"loss of micro-batch {i}" for i, (a, b) in enumerate(zip(losses, second, strict=True)) if repr(a) != repr(b)
    ]
    for name, parameter in parameters.items():
        grad = parameter.grad
        if (grad is None) != (name not in first) or (grad is not None and not _same_bits(first[name], grad.detach())):
            found.append(name)
    return found


def explained(step: int, found: list[str]) -> str:
    """What differing results of a step mean, and what to do."""
    return (
        f"step {step}: computed twice, {len(found)} results differ ({', '.join(found[:3])}). No update was made; the "
        "last good checkpoint stays. On a CPU this is faulty hardware: resume on another machine. On a GPU it may be a "
        "kernel that adds in no fixed order: then leave recheck at 0."
    )


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))

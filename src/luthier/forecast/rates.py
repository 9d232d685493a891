"""How fast a device is now: products, bytes and calls a second, from a short probe of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from luthier.forecast.work import Work

__all__ = ["Rates", "measured_rates"]

LEAST = 3  # turns of each, however short the time
MOVED = 2**20  # numbers of the tensor that is moved: activations are about as large
CALLS = 50  # small calls in one turn


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Of one device: operations of products, bytes, and calls of the library, each in a second."""

    products: float
    moved: float
    calls: float

    def seconds(self, work: Work) -> float:
        """What so much work takes, its parts one after another."""
        return work.products / self.products + work.moved / self.moved + work.calls / self.calls


def measured_rates(device: torch.device, dtype: torch.dtype, *, rows: int, width: int, seconds: float = 2.0) -> Rates:
    """Probe a device. Draws no random number and changes nothing but the time.

    Args:
        dtype: of the products.
        rows, width: of the products, as in the steps that are asked about: small ones are slower.
        seconds: of the whole probe, about.
    """
    rows, width = max(1, min(rows, 4096)), max(8, min(width, 4096))
    left = torch.ones(rows, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    long, small = torch.ones(MOVED, device=device), torch.ones(16, device=device, requires_grad=True)

    def calls() -> None:
        found = small
        for _ in range(CALLS):
            found = found * 1.0
        found.sum().backward()  # type: ignore[no-untyped-call]
        small.grad = None

    def product() -> None:
        left @ right

    def move() -> None:
        long * 2.0

    share = seconds / 3
    return Rates(
        products=2.0 * rows * width * width / _turn(product, device, share),
        moved=2.0 * MOVED * long.element_size() / _turn(move, device, share),
        calls=2.0 * CALLS / _turn(calls, device, share),
    )


def _turn(work: Callable[[], None], device: torch.device, seconds: float) -> float:
    """The mean time of one turn, the first left out: where others are at work here, steps wait for them too."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    turns, begun = 0, time.perf_counter()
    while turns < LEAST or time.perf_counter() - begun < seconds:
        work()
        wait()
        turns += 1
    return max(1e-9, (time.perf_counter() - begun) / turns)

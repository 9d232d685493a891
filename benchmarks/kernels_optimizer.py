"""The loop's whole optimiser step, fused and plain, beside the framework's: `python benchmarks/kernels_optimizer.py`.

A step is: the norm, clipping to it, the update, dropping the gradients. One thread; `_pairs.py` says how it is timed.
"""

from collections.abc import Callable

import torch
from _pairs import pair
from torch import nn

from luthier.kernels import plain
from luthier.runs.spec import OptimSpec
from luthier.training.optimiser import Optimiser


def make(count: int, size: int) -> tuple[dict[str, nn.Parameter], list[torch.Tensor]]:
    """`count` parameters of `size` numbers, and gradients for them."""
    generator = torch.Generator().manual_seed(0)
    parameters = {str(i): nn.Parameter(torch.randn(size, generator=generator)) for i in range(count)}
    return parameters, [torch.randn(size, generator=generator) for _ in range(count)]


def framework(count: int, size: int, **options: bool) -> Callable[[], None]:
    """The framework's optimiser in one of its three ways."""
    parameters, gradients = make(count, size)
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.01, **options)

    def step() -> None:
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(count: int, size: int, slow: bool) -> Callable[[], None]:
    """The loop's."""
    parameters, gradients = make(count, size)
    optimiser = Optimiser(parameters, [], OptimSpec(weight_decay=0.01), 1e-3)

    def step() -> None:
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g
        with plain(slow):
            optimiser.clip(optimiser.norm())
            optimiser.step(1.0)
        optimiser.zero_grad()

    return step


def main() -> None:
    """Print medians and ratios for small tunings and for a whole model."""
    for count, size in ((24, 3072), (120, 4608), (16, 1_000_000)):
        calls = {
            "framework": framework(count, size),
            "framework, foreach": framework(count, size, foreach=True),
            "framework, fused": framework(count, size, fused=True),
            "plain": ours(count, size, True),
            "ours": ours(count, size, False),
        }
        ms = pair(calls, repeats=20)
        for name, value in ms.items():
            print(f"{count:4} x {size:8}  {name:20} {value:8.3f} ms   {value / ms['ours']:5.2f} x ours")


if __name__ == "__main__":
    main()

"""The flat optimiser's whole step against the framework's, in one thread: `python benchmarks/kernels_optimizer.py`.

A step is: clip to a length, update, drop the gradients.
"""

import torch
from _pairs import pair
from torch import nn

from luthier.kernels import FlatAdamW


def make(count: int, size: int) -> tuple[dict[str, nn.Parameter], list[torch.Tensor]]:
    """`count` parameters of `size` numbers, and gradients for them."""
    generator = torch.Generator().manual_seed(0)
    parameters = {str(i): nn.Parameter(torch.randn(size, generator=generator)) for i in range(count)}
    return parameters, [torch.randn(size, generator=generator) for _ in range(count)]


def framework(count: int, size: int, **options: bool) -> object:
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


def flat(count: int, size: int) -> object:
    """Ours."""
    parameters, gradients = make(count, size)
    optimizer = FlatAdamW(parameters, lr=1e-3, weight_decay=0.01)

    def step() -> None:
        for p, g in zip(parameters.values(), gradients, strict=True):
            p.grad = g
        optimizer.step(max_norm=1.0)

    return step


def main() -> None:
    """Print medians and ratios for small tunings and for a whole model."""
    for count, size in ((24, 3072), (120, 4608), (16, 1_000_000)):
        calls = {
            "framework": framework(count, size),
            "framework, foreach": framework(count, size, foreach=True),
            "framework, fused": framework(count, size, fused=True),
            "flat": flat(count, size),
        }
        ms = pair(calls, repeats=20)  # type: ignore[arg-type]
        for name, value in ms.items():
            print(f"{count:4} x {size:8}  {name:20} {value:8.3f} ms   {value / ms['flat']:5.2f} x ours")


if __name__ == "__main__":
    main()

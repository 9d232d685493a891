"""Low-rank layers forward and backward, against separate modules as `peft` computes them, in one thread.

python benchmarks/kernels_low_rank.py
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _pairs import pair
from torch import Tensor

from luthier.kernels import Update, dora_linear, low_rank_linear, row_squares


def calls(n: int, d: int, rank: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """One site, three sites on one input, and DoRA, with everything below trained (x wants its gradient)."""
    x = torch.randn(n, d).to(dtype).requires_grad_()
    g = torch.randn(n, d).to(dtype)
    weights = [torch.randn(d, d).to(dtype) for _ in range(3)]
    updates = [Update(torch.randn(rank, d).requires_grad_(), torch.randn(d, rank).requires_grad_(), 2.0) for _ in "qkv"]
    m = torch.randn(d).requires_grad_()
    squares = row_squares(weights[0])
    leaves = [t for u in updates for t in (u.a, u.b)]

    def separate(w: Tensor, u: Update) -> Tensor:
        # fp32 updates beside a half-precision base: the input is cast up and the result down again
        return F.linear(x, w) + (F.linear(F.linear(x.to(u.a.dtype), u.a), u.b) * u.scale).to(dtype)

    def dora(w: Tensor, u: Update) -> Tensor:
        norm = torch.linalg.vector_norm(w + u.scale * (u.b @ u.a).detach().to(dtype), dim=1)
        return (m / norm).to(dtype) * separate(w, u)

    def back(ys: list[Tensor] | tuple[Tensor, ...], *of: Tensor) -> None:
        torch.autograd.grad(ys, (x, *of), [g] * len(ys))

    a, b, s = updates[0]
    w = weights[0]
    return {
        "one: base alone": lambda: back([F.linear(x, w)]),
        "one: separate": lambda: back([separate(w, updates[0])], a, b),
        "one: fused": lambda: back([low_rank_linear(x, w, None, a, b, s)], a, b),
        "three: base alone": lambda: back([F.linear(x, v) for v in weights]),
        "three: separate": lambda: back([separate(v, u) for v, u in zip(weights, updates, strict=True)], *leaves),
        "three: fused": lambda: back(
            [low_rank_linear(x, v, None, *u) for v, u in zip(weights, updates, strict=True)], *leaves
        ),
        "dora: separate": lambda: back([dora(w, updates[0])], a, b, m),
        "dora: fused": lambda: back([dora_linear(x, w, None, a, b, m, s, squares=squares)], a, b, m),
    }


def main() -> None:
    """Print medians, and each as a multiple of its base alone."""
    for n, d, rank in ((1024, 384, 8), (2048, 576, 8)):
        for dtype in (torch.float32, torch.bfloat16):
            ms = pair(calls(n, d, rank, dtype), repeats=15)
            for name, value in ms.items():
                base = ms["three: base alone" if name.startswith("three") else "one: base alone"]
                print(f"{(n, d, rank)!s:16} {dtype!s:15} {name:26} {value:8.3f} ms  {value / base:5.2f} x base")


if __name__ == "__main__":
    main()

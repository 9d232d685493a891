"""The chunked loss against all logits at once, head frozen, in one thread: `python benchmarks/kernels_loss.py`."""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _pairs import pair
from torch import Tensor

import luthier.kernels

module = sys.modules["luthier.kernels.loss"]
N, D, V = 512, 576, 49152


def all_logits(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """As the models of the framework do it: logits, widened, then the mean's sum."""
    loss = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    return torch.autograd.grad(loss, hidden)[0]


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor, megabytes: int, piece: int) -> Tensor:
    """Ours, with a budget of logits and of fp32 pieces."""
    module._PIECE_BYTES = piece << 10  # type: ignore[attr-defined]
    loss, _ = luthier.kernels.linear_cross_entropy(hidden, weight, None, labels, chunk_bytes=megabytes << 20)
    return torch.autograd.grad(loss, hidden)[0]


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Everything to be timed in one type."""
    labels = torch.randint(0, V, (N,))
    hidden, weight = torch.randn(N, D).to(dtype).requires_grad_(), (torch.randn(V, D) / 20).to(dtype)
    g = torch.randn(N, V).to(dtype)
    made: dict[str, Callable[[], object]] = {
        "all logits": lambda: all_logits(hidden, weight, labels),
        "floor: two products": lambda: (hidden.detach() @ weight.T, g @ weight),
    }
    for megabytes in (8, 32, 128):
        for piece in (512, 1024, 4096):
            made[f"chunk {megabytes} MiB, piece {piece} KiB"] = lambda m=megabytes, p=piece: chunked(
                hidden, weight, labels, m, p
            )
    return made


def main() -> None:
    """Print medians and ratios; the two products alone are the floor."""
    for dtype in (torch.float32, torch.bfloat16):
        ms = pair(calls(dtype), repeats=3)
        for name, value in ms.items():
            print(f"{dtype!s:15} {name:28} {value:8.1f} ms   {ms['all logits'] / value:5.2f} x")


if __name__ == "__main__":
    main()

"""Element-wise parts of a trunk, forward and backward, in one thread: `python benchmarks/kernels_frozen.py`.

Rows of 384 (hidden) and 1536 (inner); "as models write it" is the chain of separate operations in model code.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _pairs import pair
from torch import Tensor

from luthier.kernels import rms_norm


def calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Everything to be timed in one type."""
    n, d, inner = 1536, 384, 1536
    x, g = torch.randn(n, d).to(dtype).requires_grad_(), torch.randn(n, d).to(dtype)
    h, gh = torch.randn(n, inner).to(dtype).requires_grad_(), torch.randn(n, inner).to(dtype)
    w, b = torch.rand(d).to(dtype), torch.rand(d).to(dtype)

    def back(y: Tensor, grad: Tensor, *of: Tensor) -> None:
        torch.autograd.grad(y, of, grad)

    def norm() -> Tensor:
        v = x.float()
        return w * (v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    def gelu_new() -> Tensor:
        return 0.5 * h * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))))

    return {
        "rms norm | as models write it": lambda: back(norm(), g, x),
        "rms norm | framework": lambda: back(F.rms_norm(x, (d,), w, 1e-6), g, x),
        "rms norm | ours": lambda: back(rms_norm(x, w, 1e-6), g, x),
        "gelu tanh | as models write it": lambda: back(gelu_new(), gh, h),
        "gelu tanh | framework": lambda: back(F.gelu(h, approximate="tanh"), gh, h),
        "gelu erf | framework": lambda: back(F.gelu(h), gh, h),
        "silu | framework": lambda: back(F.silu(h), gh, h),
        "layer norm | framework, frozen": lambda: back(F.layer_norm(x, (d,), w, b), g, x),
    }


def main() -> None:
    """Print medians, and each as a multiple of ours where there is one."""
    for dtype in (torch.float32, torch.bfloat16):
        ms = pair(calls(dtype), repeats=15)
        for name, value in ms.items():
            ours = ms.get(name.split("|")[0] + "| ours")
            print(f"{dtype!s:15} {name:32} {value:8.3f} ms" + (f"  {value / ours:5.2f} x ours" if ours else ""))


if __name__ == "__main__":
    main()

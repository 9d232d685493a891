"""A frozen weight in the layout that the CPU's matrix unit reads, made once instead of in every product.

    y = x Wᵀ + b          forward, from W packed
    ∂x = ∂y W             backward, from W as it is stored: its rows lie the right way there

A general product lays its weight out anew each time. For a weight that never changes that work is done once. The price
is memory: one more copy of the weight, so only a budget's worth of weights is packed.
`python benchmarks/kernels_packed.py` measures both; packing Wᵀ for the backward pass as well gained too little there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.core.fast_paths import fast

__all__ = ["Packed", "can_pack", "packed_linear"]

# The layout depends a little on how many rows are expected; one guess serves all batches.
_ROWS = 1024


def can_pack(weight: Tensor) -> bool:
    """Whether this weight can be packed here: on a CPU with fast bf16 products, in bf16."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.dim() == 2
        and torch._C._has_mkldnn
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
    )


class Packed:
    """A frozen weight (d_out, d_in) and its packed copy.

    `weight` is the original; it is what everything that is not a product looks at.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.detach()
        self._source, self._made_at = weight, self._state(weight)
        with torch.no_grad():
            self._forward = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), _ROWS)

    @staticmethod
    def _state(weight: Tensor) -> tuple[int, int, torch.dtype]:
        return weight._version, weight.data_ptr(), weight.dtype

    @property
    def fresh(self) -> bool:
        """Whether the weight is still what was packed: written to, moved or cast, it is not."""
        return self._state(self._source) == self._made_at

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight."""
        return self.weight.dtype

    def __len__(self) -> int:
        return len(self.weight)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b for rows x (n, d_in)."""
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._forward, bias, "none", [], "")
        return out

    def back(self, grad: Tensor) -> Tensor:
        """∂y W for rows ∂y (n, d_out)."""
        return grad @ self.weight


def packed_linear(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    """`F.linear(x, packed.weight, bias)` with a frozen weight and bias; x (..., d_in) of the weight's type."""
    if not fast() or x.dtype != packed.dtype:
        return torch.nn.functional.linear(x, packed.weight, bias)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return packed.linear(x.reshape(-1, x.shape[-1]), bias).view(*x.shape[:-1], len(packed))
    rows: Tensor = _PackedLinear.apply(x.reshape(-1, x.shape[-1]), packed, bias)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], len(packed))


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
        ctx.packed = packed
        return packed.linear(x, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.packed.back(grad), None, None

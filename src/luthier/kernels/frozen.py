"""The RMS norm of a frozen trunk, saving less for the backward pass than the chain of operations in model code.

    w · x / √(mean(x²) + eps)       saves x and one number per row; as written, models save x again in fp32

docs/speed-log.md has its times. What is not here did not pay: a linear layer with a frozen weight saves no input, a
layer norm with frozen numbers computes only the gradient of its input, the framework's own GELU and SiLU beat ours, and
a gated unit as one function took longer for memory that nobody lacked.

Zhang & Sennrich 2019 (RMSNorm), arXiv:1910.07467.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels._switch import fast

__all__ = ["rms_norm"]

_PIECE_BYTES = 1 << 19  # of one fp32 temporary; four of them fit a 2 MiB share of cache


def _pieces(x: Tensor) -> Iterator[slice]:
    """Slices of rows of (N, d) that stay in cache; everything at once on a device with its own memory."""
    rows = max(1, _PIECE_BYTES // (4 * max(1, x.shape[1]))) if x.device.type == "cpu" else max(1, len(x))
    return (slice(start, start + rows) for start in range(0, len(x), rows))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """Normalise the rows of x (..., d) to length √d and scale them by weight (d,).

    Args:
        plus_one: scale by 1 + weight, in fp32 and before rounding (Gemma); else the normalised rows are rounded to
            x's type first and then scaled (Llama), as those models do.
    """
    if not fast():
        v = _wide(x)
        v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + eps)
        return (v * (1 + _wide(weight))).to(x.dtype) if plus_one else weight * v.to(x.dtype)
    out: Tensor = _RMSNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        rows = _flat(x)
        dtype = x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)
        out = torch.empty(rows.shape, dtype=dtype, device=x.device)
        rate = torch.empty(len(rows), 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        gain = 1 + _wide(weight) if plus_one else weight
        for s in _pieces(rows):
            v = _wide(rows[s])
            rate[s] = v.square().mean(dim=1, keepdim=True).add_(eps).rsqrt_()
            normed = v * rate[s]
            if plus_one:
                out[s] = normed.mul_(gain)
            else:
                torch.mul(normed.to(x.dtype), gain, out=out[s])
        ctx.save_for_backward(x, weight, rate)
        ctx.plus_one = plus_one
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight, rate = ctx.saved_tensors
        rows, g = _flat(x), _flat(grad)
        gain = _wide(weight) + (1 if ctx.plus_one else 0)
        wants_x, wants_w = ctx.needs_input_grad[:2]
        gx = torch.empty_like(rows) if wants_x else None
        gw = torch.zeros_like(gain) if wants_w else None
        for s in _pieces(rows):
            wide = _wide(g[s])
            normed = _wide(rows[s]) * rate[s]
            if gw is not None:
                gw += (wide * normed).sum(0)
            if gx is not None:
                scaled = wide * gain
                along = (scaled * normed).mean(dim=1, keepdim=True)
                gx[s] = scaled.addcmul_(normed, along, value=-1).mul_(rate[s])
        return (
            None if gx is None else gx.view(x.shape),
            None if gw is None else gw.to(weight.dtype),
            None,
            None,
        )

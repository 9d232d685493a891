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

from luthier.core.fast_paths import fast

__all__ = ["rms_norm"]

# Of one fp32 temporary, for each thread; smaller ones cost more in calls than they save in cache.
_PIECE_BYTES = 2 << 20

# Numbers up to which a row's cost is that of the calls: one token, or the tokens of a small batch.
_FEW = 1 << 16


def _pieces(x: Tensor) -> Iterator[slice]:
    """Slices of rows of (N, d) that bound the temporaries; everything at once on a device with its own memory."""
    on_cpu = x.device.type == "cpu"
    rows = _PIECE_BYTES * torch.get_num_threads() // (4 * max(1, x.shape[1])) if on_cpu else len(x)
    rows = max(1, rows)
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
    if x.numel() <= _FEW and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _few_rows(x, weight, eps, plus_one)
    out: Tensor = _RMSNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-untyped-call]
    return out


def _few_rows(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """`_RMSNorm` to the bit, without a frame for a backward pass: around one row it takes most of the time."""
    v = _wide(x)
    length = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    # eps + length² / d: each call counts here, and a number is a tensor only once.
    rate = torch.addcdiv(_number(eps, v), length * length, _number(x.shape[-1], v)).rsqrt_()
    normed: Tensor = v * rate
    if plus_one:
        return normed.mul_(1 + _wide(weight)).to(x.dtype)
    return normed.mul_(weight) if normed.dtype == x.dtype == weight.dtype else normed.to(x.dtype) * weight


def _number(value: float, like: Tensor) -> Tensor:
    """A number as a tensor without dimensions, of the type and on the device of `like`; kept."""
    if torch.compiler.is_compiling():
        return like.new_tensor(value)
    key = (value, like.dtype, like.device)
    found = _numbers.get(key)
    if found is None:
        with torch.inference_mode(False):
            found = _numbers[key] = torch.tensor(value, dtype=like.dtype, device=like.device)
    return found


_numbers: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        rows = _flat(x)
        dtype = x.dtype if plus_one else torch.promote_types(x.dtype, weight.dtype)
        whole = torch.empty(x.shape, dtype=dtype, device=x.device)  # a view handed out could not be written to
        out = _flat(whole)
        rate = torch.empty(len(rows), 1, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        gain = 1 + _wide(weight) if plus_one else weight
        for s in _pieces(rows):
            v = _wide(rows[s])
            length = torch.linalg.vector_norm(v, dim=1, keepdim=True)
            rate[s] = length.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
            normed = v * rate[s] if v.dtype == rows.dtype else v.mul_(rate[s])
            if plus_one:
                out[s] = normed.mul_(gain)
            else:
                torch.mul(normed.to(x.dtype), gain, out=out[s])
        ctx.save_for_backward(x, weight, rate)
        ctx.plus_one = plus_one
        return whole

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
            wide, v = _wide(g[s]), _wide(rows[s])
            if gw is not None:
                gw += (wide * (v * rate[s])).sum(0)
            if gx is not None:
                # r (w g - x̂ mean(w g x̂)) with x̂ = r x: no normed copy of x is made.
                scaled = wide * gain if wide.dtype == g.dtype else wide.mul_(gain)
                along = (scaled * v).sum(dim=1, keepdim=True).mul_(rate[s].square()).div_(-rows.shape[1])
                gx[s] = scaled.addcmul_(v, along).mul_(rate[s])
        return (
            None if gx is None else gx.view(x.shape),
            None if gw is None else gw.to(weight.dtype),
            None,
            None,
        )

"""Element-wise parts of a trunk that save less for the backward pass than the chain of operations in model code.

    rms_norm:  w · x / √(mean(x²) + eps)       saves x and one number per row; as written, models save x again in fp32
    gated:     act(gate) · up                  saves gate and up; act(gate) is computed again

They are here for memory; docs/speed-log.md has their times. What is not here did not pay: a linear layer with a frozen
weight saves no input, a layer norm with frozen numbers computes only the gradient of its input, and the framework's own
GELU and SiLU beat ours. A model that writes out the tanh-GELU in five operations gains from
`F.gelu(x, approximate="tanh")`.

Zhang & Sennrich 2019 (RMSNorm), arXiv:1910.07467. Shazeer 2020 (gated units), arXiv:2002.05202.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.core import UnknownName
from luthier.kernels._switch import fast

__all__ = ["gated", "rms_norm"]

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


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """`act(gate) · up`, (..., d) each.

    Args:
        activation: "silu" or "gelu_tanh".

    Raises:
        UnknownName: another activation.
    """
    if activation not in ("silu", "gelu_tanh"):
        raise UnknownName(f"gated: no activation is called {activation!r}. Take 'silu' or 'gelu_tanh'.")
    silu = activation == "silu"
    if not fast():
        return _act(gate, silu) * up
    out: Tensor = _Gated.apply(gate, up, silu)  # type: ignore[no-untyped-call]
    return out


def _act(gate: Tensor, silu: bool) -> Tensor:
    return F.silu(gate) if silu else F.gelu(gate, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, silu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.silu = silu
        return _act(gate, silu).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        gate, up = ctx.saved_tensors
        rows, others, g = _flat(gate), _flat(up), _flat(grad)
        g_gate = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        g_up = torch.empty_like(others) if ctx.needs_input_grad[1] else None
        for s in _pieces(rows):
            if g_up is not None:
                torch.mul(_act(rows[s], ctx.silu), g[s], out=g_up[s])
            if g_gate is not None:
                through = g[s] * others[s]
                if ctx.silu:
                    g_gate[s] = torch.ops.aten.silu_backward(through, rows[s])
                else:
                    g_gate[s] = torch.ops.aten.gelu_backward(through, rows[s], approximate="tanh")
        return (
            None if g_gate is None else g_gate.view(gate.shape),
            None if g_up is None else g_up.view(up.shape),
            None,
        )

"""A learned scale (IA3) and a bottleneck (adapter), each as one function that saves little.

    scale:       y · l                                            l: (d,)
    bottleneck:  y + s · (act(x Dᵀ + c) Uᵀ + e)                   D: (width, d_in)   U: (d_out, width)

Products run in the type of the activations; trained numbers may be kept wider and get gradients in their own type.

Liu et al. 2022 (IA3), arXiv:2205.05638, section 3.3. Houlsby et al. 2019 (adapters), arXiv:1902.00751, section 2.1.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.core import UnknownName, near
from luthier.core.fast_paths import fast
from luthier.kernels.low_rank import _sum_of_products

__all__ = ["bottleneck", "scale"]

_ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "identity": (lambda h: h, lambda g, h: g),
    "relu": (F.relu, lambda g, h: torch.ops.aten.threshold_backward(g, h, 0)),
    "gelu": (F.gelu, lambda g, h: torch.ops.aten.gelu_backward(g, h)),
    "gelu_tanh": (
        lambda h: F.gelu(h, approximate="tanh"),
        lambda g, h: torch.ops.aten.gelu_backward(g, h, approximate="tanh"),
    ),
    "silu": (F.silu, lambda g, h: torch.ops.aten.silu_backward(g, h)),
    "tanh": (torch.tanh, lambda g, h: torch.ops.aten.tanh_backward(g, torch.tanh(h))),
}


def scale(y: Tensor, factors: Tensor) -> Tensor:
    """`y · factors` in the type of y; y: (..., d), factors: (d,)."""
    if not _takes(y):
        return y * factors.to(y.dtype)
    out: Tensor = _Scale.apply(y, factors)  # type: ignore[no-untyped-call]
    return out


def _takes(*streams: Tensor) -> bool:
    """Whether a function that chooses its own types computes this: in autocast, where those are what it would take."""
    device = streams[0].device.type
    if not fast() or not torch.is_autocast_enabled(device):
        return fast()
    low = torch.get_autocast_dtype(device)
    return all(x.dtype == low for x in streams)


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, factors: Tensor) -> Tensor:
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, factors)
        return y * factors.to(y.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, factors = ctx.saved_tensors
        gy = grad * factors.to(grad.dtype) if ctx.needs_input_grad[0] else None
        gf = None
        if ctx.needs_input_grad[1]:
            d = y.shape[-1]
            gf = _sum_of_products(grad.reshape(-1, d), y.reshape(-1, d)).to(factors.dtype)
        return gy, gf


def bottleneck(
    y: Tensor,
    x: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    factor: float = 1.0,
    activation: str = "gelu",
) -> Tensor:
    """`y + factor · (act(x downᵀ + down_bias) upᵀ + up_bias)`; x and y may be the same tensor.

    Args:
        y: (..., d_out). x: (..., d_in).
        down: (width, d_in). up: (d_out, width).
        activation: "identity", "relu", "gelu", "gelu_tanh", "silu" or "tanh"; computed again in the backward pass.

    Raises:
        UnknownName: no activation of that name.
    """
    if activation not in _ACTIVATIONS:
        known = list(_ACTIVATIONS)
        raise UnknownName(
            f"bottleneck: no activation is called {activation!r}.{near(activation, known)}"
            f" Take one of {', '.join(known)}."
        )
    if not _takes(x, y):
        dtype = x.dtype
        act = _ACTIVATIONS[activation][0]
        h = act(F.linear(x, down.to(dtype), None if down_bias is None else down_bias.to(dtype)))
        return y + F.linear(h, up.to(dtype), None if up_bias is None else up_bias.to(dtype)) * factor
    device = x.device.type
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        rows: Tensor = _Bottleneck.apply(  # type: ignore[no-untyped-call]
            y.reshape(-1, y.shape[-1]), x, down, down_bias, up, up_bias, factor, activation
        )
    return rows.view(y.shape)  # viewed out here, since models write into it


class _Bottleneck(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        down: Tensor,
        down_bias: Tensor | None,
        up: Tensor,
        up_bias: Tensor | None,
        factor: float,
        activation: str,
    ) -> Tensor:
        dtype = x.dtype
        rows = x.reshape(-1, x.shape[-1])
        before = F.linear(rows, down.to(dtype), None if down_bias is None else down_bias.to(dtype))
        h = _ACTIVATIONS[activation][0](before)
        out = torch.addmm(y, h, up.to(dtype).T, alpha=factor)
        if up_bias is not None:
            out.add_(up_bias.to(dtype), alpha=factor)
        ctx.save_for_backward(x, before, down, down_bias, up, up_bias)
        ctx.factor, ctx.activation = factor, activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, before, down, down_bias, up, up_bias = ctx.saved_tensors
        dtype, factor = x.dtype, ctx.factor
        act, act_backward = _ACTIVATIONS[ctx.activation]
        _, wants_x, wants_down, wants_down_bias, wants_up, wants_up_bias, _, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        wide = torch.promote_types(dtype, torch.float32)
        gx = gd = gdb = gu = gub = None
        if wants_up:
            gu = (act(before).T @ g).T.to(up.dtype).mul_(factor)
        if wants_up_bias:
            gub = g.sum(0, dtype=wide).mul_(factor).to(up_bias.dtype)
        if wants_x or wants_down or wants_down_bias:
            gh = act_backward((g @ up.to(dtype)).mul_(factor), before)
            if wants_down:
                gd = (gh.T @ x.reshape(-1, x.shape[-1])).to(down.dtype)
            if wants_down_bias:
                gdb = gh.sum(0, dtype=wide).to(down_bias.dtype)
            if wants_x:
                gx = (gh @ down.to(dtype)).view(x.shape)
        return grad, gx, gd, gdb, gu, gub, None, None

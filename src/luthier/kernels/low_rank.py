"""A frozen linear layer and its low-rank update as one function (LoRA).

    y = x Wᵀ + bias + scale · drop(x) Aᵀ Bᵀ       W: (d_out, d_in) frozen   A: (rank, d_in)   B: (d_out, rank)

Saved for the backward pass are the thin product x Aᵀ, and x itself where A learns; a dropped copy of x is replayed from
its seed. The
order of products goes through the thin side always: nothing of size (d_out, d_in) is made. Products run in W's type,
which accumulates in fp32 inside a bf16 product; gradients of A and B are rounded once to that type and handed over in
the type of A and B.

Hu et al. 2021, arXiv:2106.09685, section 4.1. Liu et al. 2024 (DoRA), arXiv:2402.09353, sections 4.1 and 4.3.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.core import ConfigError
from luthier.core.fast_paths import fast
from luthier.kernels.dropout import dropout
from luthier.kernels.packed import Packed
from luthier.kernels.stored import Held

__all__ = ["Update", "dora_linear", "dora_norm", "low_rank_linear", "row_squares"]


class Update(NamedTuple):
    """One site's low-rank update: `scale · B A`, A: (rank, d_in), B: (d_out, rank)."""

    a: Tensor
    b: Tensor
    scale: float


def low_rank_linear(
    x: Tensor,
    weight: Tensor | Packed | Held,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """`F.linear(x, weight, bias) + scale · F.linear(F.linear(dropout(x, p, seed), a), b)`, in the type of `weight`.

    Args:
        x: (..., d_in).
        weight: (d_out, d_in), packed, or held in codes. If it wants a gradient itself, the plain formula gives it one.
        a: (rank, d_in). b: (d_out, rank).
        p: dropout on the input of the update only; needs `seed`.

    Raises:
        ConfigError: p above 0 without a seed.
    """
    if p > 0.0 and seed is None:
        raise ConfigError(f"low_rank_linear: p={p} needs a seed; take one from luthier.core.key(...).")
    trains = isinstance(weight, Tensor) and weight.requires_grad
    frozen = not (trains or (bias is not None and bias.requires_grad))
    if not fast() or not frozen or torch.is_autocast_enabled(x.device.type):
        return _plain(x, _tensor(weight), bias, a, b, scale, p, seed)
    rows: Tensor = _LowRank.apply(x, weight, bias, a, b, float(scale), p, seed)  # type: ignore[no-untyped-call]
    # Viewed out here: models write into what a projection gives, and torch refuses that for a view made in a function.
    return rows.view(*x.shape[:-1], len(b))


def _plain(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, p: float, seed: int | None
) -> Tensor:
    dtype = weight.dtype
    x = x.to(dtype)
    dropped = x if seed is None else dropout(x, p, seed)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, a.to(dtype)), b.to(dtype)) * scale


class _LowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Packed | Held,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> Tensor:
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropped = rows if p == 0.0 or seed is None else dropout(rows, p, seed)
        h = dropped @ a.to(dtype).T
        y = _linear(rows, weight, bias)
        # B as (rank, d_out) rows: a thin product reads it twice as fast so, and copying it costs nothing.
        y.addmm_(h, b.to(dtype).T.contiguous(), alpha=scale)
        # Where A is frozen nothing as wide as x is kept.
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, h, a, b)
        ctx.weight, ctx.scale, ctx.p, ctx.seed, ctx.form = weight, scale, p, seed, (x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, h, a, b = ctx.saved_tensors
        shape, given = ctx.form
        dtype = ctx.weight.dtype
        g = grad.reshape(-1, grad.shape[-1])
        thin = (g @ b.to(dtype)).mul_(ctx.scale)
        gx = ga = gb = None
        drops = ctx.p > 0.0 and ctx.seed is not None
        if ctx.needs_input_grad[0]:
            gx = g @ _tensor(ctx.weight)
            if drops:
                gx.add_(dropout(thin @ a.to(dtype), ctx.p, ctx.seed))
            else:
                gx.addmm_(thin, a.to(dtype))
            gx = gx.view(shape).to(given)
        if ctx.needs_input_grad[3]:
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            ga = (thin.T @ (dropout(rows, ctx.p, ctx.seed) if drops else rows)).to(a.dtype)
        if ctx.needs_input_grad[4]:
            # (hᵀ g)ᵀ and not gᵀ h: the long transposed operand is read along its rows.
            gb = (h.T @ g).T.to(b.dtype).mul_(ctx.scale)
        return gx, None, None, ga, gb, None, None, None


def _tensor(weight: Tensor | Packed | Held) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.weight


def _linear(rows: Tensor, weight: Tensor | Packed | Held, bias: Tensor | None) -> Tensor:
    return F.linear(rows, weight, bias) if isinstance(weight, Tensor) else weight.linear(rows, bias)


def row_squares(weight: Tensor) -> Tensor:
    """Σ_in W² of each row of (d_out, d_in), at least in fp32: what `dora_norm` wants cached, since W is frozen."""
    return weight.to(_wide(weight.dtype)).square().sum(dim=1)


def dora_norm(weight: Tensor, a: Tensor, b: Tensor, scale: float, squares: Tensor | None = None) -> Tensor:
    """‖W + scale · B A‖ of each row (d_out,), without making the product, detached (arXiv:2402.09353, section 4.3).

        ‖W‖² + 2 s (W Aᵀ) · B + s² (B (A Aᵀ)) · B

    Args:
        squares: `row_squares(weight)`, computed here when not given.
    """
    wide = _wide(weight.dtype)
    with torch.no_grad():
        if not fast():
            whole: Tensor = torch.linalg.vector_norm(weight.to(wide) + scale * (b.to(wide) @ a.to(wide)), dim=1)
            return whole
        squares = row_squares(weight) if squares is None else squares
        a_wide, b_wide = a.to(wide), b.to(wide)
        cross = (weight @ a.to(weight.dtype).T).to(wide)
        total = squares + ((2 * scale) * cross + (scale * scale) * (b_wide @ (a_wide @ a_wide.T))).mul_(b_wide).sum(1)
        norm: Tensor = total.clamp_min_(0).sqrt_()
        return norm


def dora_linear(
    x: Tensor,
    weight: Tensor | Packed | Held,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    scale: float,
    p: float = 0.0,
    seed: int | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """`m / ‖W + s B A‖ · (x Wᵀ + s drop(x) Aᵀ Bᵀ) + bias`, with the norm held constant in the backward pass.

    Args:
        x: (..., d_in). magnitude: m, (d_out,).
        p: dropout on the input of the update only; needs `seed`.
        squares: `row_squares(weight)`, to be cached by the caller.

    Raises:
        ConfigError: p above 0 without a seed.
    """
    if p > 0.0 and seed is None:
        raise ConfigError(f"dora_linear: p={p} needs a seed; take one from luthier.core.key(...).")
    plain = _tensor(weight)
    norm = dora_norm(plain, a, b, scale, squares)
    trained_base = plain.requires_grad or (bias is not None and bias.requires_grad)
    if not fast() or trained_base or torch.is_autocast_enabled(x.device.type):
        z = _plain(x, plain, None, a, b, scale, p, seed)
        y = z * (magnitude / norm).to(z.dtype)
        return y if bias is None else y + bias
    rows: Tensor = _Dora.apply(x, weight, bias, a, b, magnitude, norm, scale, p, seed)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], len(plain))


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | Packed | Held,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        magnitude: Tensor,
        norm: Tensor,
        scale: float,
        p: float,
        seed: int | None,
    ) -> Tensor:
        dtype = weight.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        dropped = rows if p == 0.0 or seed is None else dropout(rows, p, seed)
        h = dropped @ a.to(dtype).T
        z = _linear(rows, weight, None).addmm_(h, b.to(dtype).T.contiguous(), alpha=scale)
        gain = (magnitude / norm).to(dtype)
        y = z * gain if bias is None else torch.addcmul(bias, z, gain)
        # z is kept because m's gradient is Σ g z / norm: computing it again is the base product once more.
        ctx.save_for_backward(x, h, z, a, b, magnitude, norm)
        ctx.weight, ctx.scale, ctx.p, ctx.seed = weight, scale, p, seed
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, h, z, a, b, magnitude, norm = ctx.saved_tensors
        weight, scale = ctx.weight, ctx.scale
        dtype = weight.dtype
        replays = ctx.p > 0.0 and ctx.seed is not None
        g = grad.reshape(-1, grad.shape[-1])
        gx = ga = gb = gm = None
        if ctx.needs_input_grad[5]:
            gm = (_sum_of_products(g, z) / norm).to(magnitude.dtype)
        g = g * (magnitude / norm).to(dtype)
        gh = (g @ b.to(dtype)).mul_(scale)
        if ctx.needs_input_grad[3]:
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            ga = (gh.T @ (dropout(rows, ctx.p, ctx.seed) if replays else rows)).to(a.dtype)
        if ctx.needs_input_grad[4]:
            gb = (h.T @ g).T.to(b.dtype).mul_(scale)
        if ctx.needs_input_grad[0]:
            gx = g @ _tensor(weight)
            if replays:
                gx.add_(dropout(gh @ a.to(dtype), ctx.p, ctx.seed))
            else:
                gx.addmm_(gh, a.to(dtype))
            gx = gx.view(x.shape).to(x.dtype)
        return gx, None, None, ga, gb, gm, None, None, None, None


def _sum_of_products(g: Tensor, y: Tensor, rows: int = 256) -> Tensor:
    """Σ over rows of g·y, (N, d) -> (d,), widened before it is summed, a block at a time so that it stays in cache."""
    wide = _wide(y.dtype)
    total = torch.zeros(y.shape[1], dtype=wide, device=y.device)
    for start in range(0, len(y), rows):
        total += (g[start : start + rows].to(wide) * y[start : start + rows]).sum(0)
    return total


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)

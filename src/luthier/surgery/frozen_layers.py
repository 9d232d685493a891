"""Frozen layers, computed faster by functions that equal them.

    linear layers of bf16 weights   packed once for the CPU's matrix unit, as far as the memory budget goes
    RMS norms                       one function that keeps x and a number per row, not fp32 copies
    dropout, where it is wanted     from counters: every core draws, and no mask is kept

Each replacement is recognised by what a layer computes, not by its name alone: it is tried on random rows first and
taken only if the results agree. Nothing here changes a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier import kernels
from luthier.kernels.packed import Packed, can_pack, packed_linear

__all__ = ["BUDGET_BYTES", "fast_dropout", "fast_linear", "fast_norm"]

# A copy of every packed weight: a model whose linear layers hold more than this keeps its memory instead.
BUDGET_BYTES = 256 << 20

# Narrower layers gain nothing from packing: 384 wide, a training step was 5 % slower with it (docs/speed-log.md).
MIN_WIDTH = 512

FastLayer = Callable[[Tensor], Tensor | None]
"""Computes the layer, or says with None that it no longer can."""


def fast_linear(module: nn.Module, min_width: int = MIN_WIDTH) -> tuple[FastLayer, Packed] | None:
    """The layer from a packed weight; None where it cannot be had, or where it is narrower than `min_width`."""
    if type(module) is not nn.Linear or module.weight.requires_grad or not can_pack(module.weight):
        return None
    if min(module.weight.shape) < min_width:
        return None
    bias = module.bias
    if bias is not None and (bias.requires_grad or bias.dtype != module.weight.dtype):
        return None
    packed = Packed(module.weight)
    frozen_bias = None if bias is None else bias.detach()

    def fast(x: Tensor) -> Tensor | None:
        return packed_linear(x, packed, frozen_bias) if packed.fresh else None

    return fast, packed


def fast_dropout(module: nn.Module) -> FastLayer | None:
    """Dropout keyed by one draw of the ambient generator: other numbers than the framework's, of the same kind."""
    if type(module) is not nn.Dropout or module.inplace or not 0 < module.p < 1:
        return None

    def fast(x: Tensor) -> Tensor | None:
        if not module.training:
            return x
        return kernels.dropout(x, module.p, int(torch.randint(2**62, ()))) if 0 < module.p < 1 else None

    return fast


def fast_norm(module: nn.Module) -> FastLayer | None:
    """An RMS norm with frozen numbers as one function; None where the layer computes something else."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or weight.requires_grad:
        return None
    if isinstance(module, nn.LayerNorm | nn.Linear | nn.Embedding) or getattr(module, "bias", None) is not None:
        return None
    if module._forward_pre_hooks or module._forward_hooks:
        return None  # somebody listens there, such as a parallel adapter that reads what the sublayer reads
    eps: Any = next((getattr(module, n) for n in ("variance_epsilon", "eps", "epsilon") if hasattr(module, n)), None)
    if not isinstance(eps, float):
        return None
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, weight.numel(), generator=generator).to(weight.device, weight.dtype)
    with torch.no_grad():
        try:
            expected = module(rows)
        except (RuntimeError, TypeError, ValueError):
            return None  # no norm of rows
        for plus_one in (False, True):
            if _agree(kernels.rms_norm(rows, weight.detach(), eps, plus_one), expected):
                return _norm(weight, eps, plus_one)
    return None


def _norm(weight: Tensor, eps: float, plus_one: bool) -> FastLayer:
    frozen, made_at = weight.detach(), (weight._version, weight.data_ptr())

    def fast(x: Tensor) -> Tensor | None:
        # Written to or moved since, the weight may also train by now.
        fresh = (weight._version, weight.data_ptr()) == made_at and not weight.requires_grad
        return kernels.rms_norm(x, frozen, eps, plus_one) if fresh else None

    return fast


def _agree(found: Tensor, expected: Any) -> bool:
    if not isinstance(expected, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    close = 2e-2 if expected.dtype in (torch.bfloat16, torch.float16) else 1e-5
    return bool(torch.allclose(found.float(), expected.float(), rtol=close, atol=close))

"""A frozen linear layer whose weight is held in codes: it is made for each product and forgotten after it.

    y = x Wᵀ + b          W decoded for the product
    ∂x = ∂y W             W decoded again: nothing of its size is kept from the forward to the backward pass

The weight is no parameter. `weight` gives it as a float layer would hold it; `held` stands for it in fused functions.
bitsandbytes 0.50.2's layer is not used: on CPUs with AVX512-BF16 it rewrites its own weight, with loss, at the first
evaluation pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.kernels.codes import Format

__all__ = ["Held", "StoredLinear", "held_linear"]


def _encoded(form: Format, weight: Tensor) -> dict[str, Tensor]:
    if not weight.is_meta:
        return form.encode(weight)
    # Without numbers all layers of a shape are alike, and a large model has hundreds of few shapes.
    return {name: torch.empty_like(part) for name, part in _empty(form, tuple(weight.shape)).items()}


@cache
def _empty(form: Format, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return form.encode(torch.empty(shape, device="meta"))


class Held:
    """The weight of a `StoredLinear` for fused functions, as `Packed` is: nothing is decoded until it is asked for."""

    fresh = True

    def __init__(self, layer: StoredLinear) -> None:
        self._layer = layer

    @property
    def weight(self) -> Tensor:
        """(d_out, d_in), decoded now."""
        return self._layer.decoded()

    @property
    def dtype(self) -> torch.dtype:
        """In which the weight is decoded."""
        return self._layer.dtype

    def __len__(self) -> int:
        return self._layer.out_features

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x Wᵀ + b for rows x (n, d_in)."""
        return nn.functional.linear(x, self.weight, bias)

    def back(self, grad: Tensor) -> Tensor:
        """∂y W for rows ∂y (n, d_out)."""
        return grad @ self.weight


class StoredLinear(nn.Linear):
    """A linear layer with its weight in a `Format`.

    Args:
        weight: (d_out, d_in), of float type; it is encoded and not kept.
        bias: taken as it is.
        form: how the weight is written.
        dtype: in which it is decoded.
        transposed: the layer that it stands for stores its weight as (d_in, d_out).

    Attributes:
        original: gives the float weight (d_out, d_in) again, read from where it came from; None where nobody knows.
    """

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None, form: Format, dtype: torch.dtype, *, transposed: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.form, self.dtype, self.transposed = form, dtype, transposed
        self.original: Callable[[], Tensor] | None = None
        self.register_parameter("bias", bias)
        for name, part in _encoded(form, weight).items():
            self.register_buffer(name, part)

    def decoded(self, instead: dict[str, Tensor] | None = None) -> Tensor:
        """(d_out, d_in) in the layer's type, of memory of its own.

        Args:
            instead: parts to take in place of those that the layer has.
        """
        parts = {name: part for name, part in self._buffers.items() if part is not None} | (instead or {})
        return self.form.decode(parts, (self.out_features, self.in_features)).to(self.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """As a float layer would hold it: (d_out, d_in), or (d_in, d_out) where that is transposed."""
        whole = self.decoded()
        return whole.T if self.transposed else whole  # (d_in, d_out)

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of `weight`, without making it."""
        shape = self.out_features, self.in_features
        return (shape[1], shape[0]) if self.transposed else shape

    @property
    def held(self) -> Held:
        """The weight for fused functions."""
        return Held(self)

    def forward(self, x: Tensor) -> Tensor:
        return held_linear(x, self.held, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {type(self.form).__name__}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Moved, the parts follow; cast, they stay what they are: other constants would be another weight.
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, part in before.items():
            after = self._buffers[name]
            if part is not None and after is not None and after.dtype != part.dtype:
                self._buffers[name] = part.to(after.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


def held_linear(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    """`F.linear(x, held.weight, bias)`; x (..., d_in) -> (..., d_out). Gives gradients of x and of the bias."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return _apply(x.to(dtype), held, None if bias is None else bias.to(dtype))
    return _apply(x.to(held.dtype), held, None if bias is None else bias.to(held.dtype))


def _apply(x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
    rows: Tensor = _HeldLinear.apply(x.reshape(-1, x.shape[-1]), held, bias)  # type: ignore[no-untyped-call]
    return rows.view(*x.shape[:-1], len(held))  # (rows, d_out) -> (..., d_out)


class _HeldLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Held, bias: Tensor | None) -> Tensor:
        ctx.held = held
        return nn.functional.linear(x, held.weight.to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        wants_x, _, wants_bias = ctx.needs_input_grad
        x = grad @ ctx.held.weight.to(grad.dtype) if wants_x else None
        return x, None, grad.sum(0) if wants_bias else None

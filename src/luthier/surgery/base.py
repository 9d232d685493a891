"""The frozen layer as a method may see it: `weight()` as (d_out, d_in) and `bias()`, however they are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from luthier.anatomy.site import Rows, Site

__all__ = ["Base", "join_rows", "take_rows"]


def take_rows(y: Tensor, rows: Rows) -> Tensor:
    """This site's part of a fused output. y: (..., groups * stride) -> (..., groups * width)."""
    if rows.groups == 1:
        return y[..., rows.offset : rows.offset + rows.width]
    grouped = y.reshape(*y.shape[:-1], rows.groups, rows.stride)[..., rows.offset : rows.offset + rows.width]
    return grouped.flatten(-2)


def join_rows(y: Tensor, changed: list[tuple[Rows, Tensor]]) -> Tensor:
    """Replace the parts `changed` of a fused output, by joining pieces.

    Writing the parts into y in place would change a tensor that autograd has saved for the backward pass.
    """
    groups, stride = changed[0][0].groups, changed[0][0].stride
    if groups == 1:
        stride = y.shape[-1]
    grouped = y.reshape(*y.shape[:-1], groups, stride)
    pieces, at = [], 0
    for rows, part in sorted(changed, key=lambda c: c[0].offset):
        if rows.offset > at:
            pieces.append(grouped[..., at : rows.offset])
        pieces.append(part.reshape(*part.shape[:-1], groups, rows.width))
        at = rows.offset + rows.width
    if at < stride:
        pieces.append(grouped[..., at:])
    return torch.cat(pieces, dim=-1).flatten(-2)


def _row_index(rows: Rows) -> Tensor:
    steps = torch.arange(rows.groups)[:, None] * rows.stride + rows.offset + torch.arange(rows.width)[None, :]
    return steps.flatten()


class Base:
    """One site's frozen layer. Read-only for methods: what it returns is detached and never a parameter."""

    def __init__(self, module: nn.Module, site: Site) -> None:
        self.module = module
        self.site = site

    def _parameter(self) -> Tensor:
        weight = getattr(self.module, self.site.param)
        assert isinstance(weight, Tensor)
        return weight if self.site.expert is None else weight[self.site.expert]

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return self._parameter().device

    @property
    def dtype(self) -> torch.dtype:
        """The type the layer is stored in."""
        return self._parameter().dtype

    def weight(self) -> Tensor:
        """(d_out, d_in), in the stored float type."""
        weight = self._parameter().detach()
        if self.site.transposed:
            weight = weight.T
        if self.site.rows is not None:
            weight = take_rows(weight.T, self.site.rows).T
        return weight

    def bias(self) -> Tensor | None:
        """(d_out,), or None where the layer has none."""
        if self.site.bias is None:
            return None
        bias = getattr(self.module, self.site.bias)
        if bias is None:
            return None
        bias = bias.detach()
        if self.site.expert is not None:
            bias = bias[self.site.expert]
        return take_rows(bias, self.site.rows) if self.site.rows is not None else bias

    def linear(self, x: Tensor) -> Tensor:
        """The frozen map of this site alone. x: (..., d_in) -> (..., d_out)."""
        return torch.nn.functional.linear(x, self.weight(), self.bias())

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put merged values back, in the layer's own layout and type. For surgery only."""
        target = self._parameter()
        target = target.T if self.site.transposed else target
        if self.site.rows is None:
            target.copy_(weight)
        else:
            target[_row_index(self.site.rows).to(target.device)] = weight.to(target.dtype)
        if bias is not None and self.site.bias is not None:
            held = getattr(self.module, self.site.bias)
            held = held if self.site.expert is None else held[self.site.expert]
            if self.site.rows is None:
                held.copy_(bias)
            else:
                held[_row_index(self.site.rows).to(held.device)] = bias.to(held.dtype)

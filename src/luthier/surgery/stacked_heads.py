"""Layers that several tunings have trained whole, such as a task head: each row of a batch takes its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["StackedHeads", "Value", "stack_heads"]


class Value(nn.Module):
    """Stands for a tensor of the model with one tuning's value."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.__dict__["value"] = value

    def forward(self, frozen: Tensor) -> Tensor:
        value: Tensor = self.__dict__["value"]
        return value


class StackedHeads:
    """A linear layer that the tunings have trained whole, each its own: picked by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias  # (tunings + 1, d_out, d_in), (tunings + 1, 1, d_out)

    def before(self, x: Tensor, index: Tensor) -> Tensor:
        return x

    def after(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        return self.linear(x, index)

    def linear(self, x: Tensor, index: Tensor) -> Tensor:
        """x: (rows, n, d_in) -> (rows, n, d_out)."""
        weight = self.weight.index_select(0, index).transpose(1, 2)  # (rows, d_in, d_out)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias.index_select(0, index), x, weight)


def stack_heads(
    base: nn.Module, values: dict[str, dict[str | None, Tensor]], dtype: torch.dtype
) -> tuple[StackedHeads, dict[str, int]]:
    names = [n for n in dict.fromkeys(n for v in values.values() for n in v) if n is not None]  # the base comes last

    def stacked(short: str) -> Tensor | None:
        base_value = getattr(base, short)
        if base_value is None:
            return None
        own: dict[str | None, Tensor] = values.get(short, {None: base_value.detach()})
        return torch.stack([own.get(n, own[None]) for n in (*names, None)]).detach().to(dtype)

    weight, bias = stacked("weight"), stacked("bias")
    assert weight is not None
    return StackedHeads(weight, None if bias is None else bias[:, None]), {n: i for i, n in enumerate(names)}

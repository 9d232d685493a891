"""A tensor of the model that a tuning trains in place: its value, the value it had, and what of it may move."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Unfrozen"]

_WORTH_HALVING = 4096


class Unfrozen:
    """A tensor of the model that a tuning trains in place.

    Attributes:
        original: the value it had, so that `detach` can restore it bit for bit.
        kept: that value as it is held. A base that was stored in bf16 and loaded in fp32 loses nothing in bf16, and
            with full fine-tuning this is half a model less.
        mask: of the values; with `holds=False` of the gradient only.
        inactive_value: the tuned value, while the tuning is not active and the model has its original.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, original: Tensor, mask: Tensor | None = None, *, holds: bool = True
    ) -> None:
        self.name, self.parameter, self.holds = name, parameter, holds
        self.inactive_value: Tensor | None = None
        self._mask = mask
        self.original = original

    @property
    def original(self) -> Tensor:
        """A new tensor where `kept` is smaller than what it stands for."""
        return self.kept.to(self._dtype)

    @original.setter
    def original(self, value: Tensor) -> None:
        self._dtype = value.dtype
        self.kept = value
        # Under a mask it is read in every step.
        large = value.numel() >= _WORTH_HALVING and not value.is_meta
        if large and value.dtype == torch.float32 and self._mask is None:
            small = value.to(torch.bfloat16)
            if torch.equal(small.to(torch.float32), value):
                self.kept = small

    @property
    def dtype(self) -> torch.dtype:
        """The type that the base holds it in."""
        return self._dtype

    @property
    def mask(self) -> Tensor | None:
        """What of it may move; None, all of it."""
        return self._mask

    @mask.setter
    def mask(self, mask: Tensor | None) -> None:
        self._mask = mask
        self.original = self.original

    @property
    def value(self) -> Tensor:
        """The tuned value, whether or not it acts now; in the model's own memory where it does."""
        return self.parameter.detach() if self.inactive_value is None else self.inactive_value

    def deactivate(self) -> None:
        """Put the original value into the model."""
        self.inactive_value = self.parameter.data
        self.parameter.data = self.original

    def activate(self) -> None:
        """Put the tuned value into the model."""
        assert self.inactive_value is not None
        self.parameter.data = self.inactive_value
        self.inactive_value = None

    def follow_device(self) -> None:
        """Move what lies beside the parameter to where the parameter is by now."""
        where = self.parameter.device
        self.kept = self.kept.to(where)
        self._mask = None if self._mask is None else self._mask.to(where)
        self.inactive_value = None if self.inactive_value is None else self.inactive_value.to(where)

"""A tensor of the model that a tuning trains in place: its value, the value it had, and what of it may move."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["WORTH_HALVING", "Unfrozen"]

WORTH_HALVING = 4096  # numbers; of less, the type that a value is kept in is all the same

# Versions of a parameter are counted from here for each value that is put into it, so that no two of them meet by steps
# in place.
_STRIDE = 1 << 20
_values = itertools.count(1)


def _fresh_version() -> int:
    return (next(_values) % 2000) * _STRIDE


def _set_version(parameter: nn.Parameter, version: int) -> None:
    """Tell autograd which value stands in `parameter`: a graph that saved another one is refused in its backward pass.

    Assigning `.data` is not seen by it, and gradients would be computed with the numbers of another tuning.
    """
    torch._C._autograd._unsafe_set_version_counter((parameter,), (version,))


class Unfrozen:
    """A tensor of the model that a tuning trains in place.

    Attributes:
        original: the value it had, so that `detach` can restore it bit for bit.
        kept: that value as it is held. A base that was stored in bf16 and loaded in fp32 loses nothing in bf16, and
            with full fine-tuning this is half a model less.
        mask: of the values; with `holds=False` of the gradient only.
        notes: tensors that its method wants back later in the run; a checkpoint holds them, a saved tuning does not.
            Two are known here: `still`, the entries of the mask that lie still, and `learnt`, their values.
        derived: the mask follows from the base's weights, and `begin` chooses it again: its places are not stored.
        inactive_value: the tuned value, while the tuning is not active and the model has its original.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, original: Tensor, mask: Tensor | None = None, *, holds: bool = True
    ) -> None:
        self.name, self.parameter, self.holds = name, parameter, holds
        self.inactive_value: Tensor | None = None
        self.derived = False
        self.notes: dict[str, Tensor] = {}
        self._mask = mask
        self.original = original
        self._versions = {"original": _fresh_version(), "tuned": parameter._version}

    @property
    def original(self) -> Tensor:
        """A new tensor where `kept` is smaller than what it stands for."""
        return self.kept.to(self._dtype)

    @original.setter
    def original(self, value: Tensor) -> None:
        self._dtype = value.dtype
        self.kept = value
        # Under a mask it is read in every step.
        large = value.numel() >= WORTH_HALVING and not value.is_meta
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

    def let_lie(self, still: Tensor) -> None:
        """Of the entries under the mask, let these keep the values they have now, until this is called again.

        Args:
            still: bool, shaped as the value.
        """
        self.notes = {"still": still, "learnt": self.value[still]} if bool(still.any()) else {}

    @property
    def moving(self) -> Tensor | None:
        """The mask without what lies still; None, all of it moves."""
        still = self.notes.get("still")
        return self._mask if still is None or self._mask is None else self._mask & ~still

    @property
    def value(self) -> Tensor:
        """The tuned value, whether or not it acts now; in the model's own memory where it does."""
        return self.parameter.detach() if self.inactive_value is None else self.inactive_value

    def deactivate(self) -> None:
        """Put the original value into the model."""
        self.inactive_value = self.parameter.data
        self._versions["tuned"] = self.parameter._version
        self.parameter.data = self.original
        _set_version(self.parameter, self._versions["original"])

    def activate(self) -> None:
        """Put the tuned value into the model."""
        assert self.inactive_value is not None
        self.parameter.data = self.inactive_value
        self.inactive_value = None
        _set_version(self.parameter, self._versions["tuned"])

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move and cast what lies beside the parameter, after `fn` has done so with the model's own tensors."""
        where = self.parameter.device

        def cast(dtype: torch.dtype) -> torch.dtype:
            return fn(torch.empty(0, dtype=dtype)).dtype

        self.kept = self.kept.to(where)
        if cast(self._dtype) != self._dtype:  # else `kept` may stay smaller than what it stands for
            self.original = self.original.to(cast(self._dtype))
        self._mask = None if self._mask is None else self._mask.to(where)
        self.notes = {n: note.to(where) for n, note in self.notes.items()}
        if self.inactive_value is not None:
            self.inactive_value = self.inactive_value.to(where, cast(self.inactive_value.dtype))

"""What a tuning holds on a model: its modules, and the model's own tensors that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.core import key
from luthier.surgery.method import Method

__all__ = ["Master", "Tuning", "Unfrozen", "keyed"]

_WORTH_HALVING = 4096


class Unfrozen:
    """A tensor of the model that a tuning trains in place.

    Attributes:
        original: the value it had, so that `detach` can restore it bit for bit.
        kept: that value as it is held. A base that was stored in bf16 and loaded in fp32 loses nothing in bf16, and
            with full fine-tuning this is half a model less.
        mask: of the values; with `holds=False` of the gradient only.
        parked: the tuned value, while the tuning is not active.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, original: Tensor, mask: Tensor | None = None, *, holds: bool = True
    ) -> None:
        self.name, self.parameter, self.holds = name, parameter, holds
        self.parked: Tensor | None = None
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


class Tuning(nn.Module):
    """One method's modules on one model, registered on the model under the tuning's name."""

    def __init__(self, name: str, method: Method) -> None:
        super().__init__()
        self.tuning_name = name
        self.method = method
        self.parts = nn.ModuleDict()
        self.keys: dict[str, str] = {}  # canonical key -> name in `parts`, where a dot may not stand
        self.unfrozen: dict[str, Unfrozen] = {}  # canonical key ("model/..." or "head/...") -> tensor
        self.fixed: set[str] = set()  # numbers in `parts` that the method itself holds still: "key.short"
        self.claims: dict[str, str] = {}  # what only one active tuning may hold -> which part of the method holds it
        self.active = True
        self.trainable = True
        self.finished = False

    def add(self, key_: str, module: nn.Module) -> None:
        """Register `module` under a canonical key."""
        name = key_.replace(".", "-")
        while name in self.parts:
            name += "_"
        self.parts[name] = module.train(self.training)
        self.keys[key_] = name

    def modules_by_key(self) -> dict[str, nn.Module]:
        """Canonical key -> module, in the order of registration."""
        return {k: self.parts[n] for k, n in self.keys.items()}


class Master(nn.Module):
    """An fp32 master in place of the layer's own low precision; whoever puts it there rounds it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.__dict__["master"] = parameter

    def forward(self, frozen: Tensor) -> Tensor:
        master: nn.Parameter = self.__dict__["master"]
        return master


@contextmanager
def keyed(seed: int, *stream: int | str) -> Iterator[None]:
    """Run a block under a generator named by (seed, stream), and leave the ambient one as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, *stream))
        yield

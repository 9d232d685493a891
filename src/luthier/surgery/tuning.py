"""What a tuning is on a model: its modules, and the model's own tensors that it trains."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from luthier.core import key
from luthier.surgery.method import Method
from luthier.surgery.unfrozen import Unfrozen

__all__ = ["ATTENTION", "BRANCH", "CALL", "FIRST", "ORDER", "PREFIX", "Master", "Tuning", "keyed"]

# What only one active tuning may claim, besides single tensors of the model.
PREFIX, BRANCH = "the keys before those of the text", "the network beside the model"
FIRST, ORDER = "the pass before each pass", "the pass to first order"
ATTENTION, CALL = "the attention at ", "the call of the block "  # and where


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
        self.masks: dict[str, Tensor] = {}  # "key.short" -> True where a number in `parts` is not held at zero
        self.notes: dict[
            str, Tensor
        ] = {}  # what its method remembers while it trains: saved with the run, not the tuning
        self.claims: dict[str, str] = {}  # what only one active tuning may hold -> which part of the method holds it
        self.sources: list[dict[str, str]] = []  # the saved tunings that it was made of: name, method, sha256
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

    def prompts(self) -> list[nn.Module]:
        """Its sources of vectors before the text."""
        return [m for k, m in self.modules_by_key().items() if k.rpartition(":")[2] == "prompt"]

    def made_by(self, method: object) -> bool:
        """Whether `method` is what this tuning carries out, or a part of it."""
        return any(part is method for part in self.method.parts())

    def shared_with(self, other: Tuning) -> str | None:
        """What both hold and only one active tuning may, or None."""
        return next((claim for claim in self.claims if claim in other.claims), None)

    def note_fixed(self) -> None:
        """Remember which numbers the method holds still, before anybody freezes the others."""
        named = ((k, n, p) for k, m in self.modules_by_key().items() for n, p in m.named_parameters())
        self.fixed = {f"{k}.{n}" for k, n, p in named if not p.requires_grad}

    def deactivate(self) -> None:
        """Give the model its own tensors back; the tuned values wait. Its modules are left out by the sockets."""
        if self.active:
            for unfrozen in self.unfrozen.values():
                unfrozen.deactivate()
            self.active = False

    def activate(self) -> None:
        """Put the tuned values into the model."""
        if not self.active:
            for unfrozen in self.unfrozen.values():
                unfrozen.activate()
            self.active = True


class Master(nn.Module):
    """An fp32 master in place of the layer's own low precision; whoever puts it there rounds it."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.__dict__["master"] = parameter  # registered once, on the model

    def forward(self, frozen: Tensor) -> Tensor:
        master: nn.Parameter = self.__dict__["master"]
        return master


@contextmanager
def keyed(seed: int, *stream: int | str) -> Iterator[None]:
    """Run a block under a generator named by (seed, stream), and leave the ambient one as it was."""
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` notes every call, with its stack, for devices that are never used: a third of an attach.
        torch.default_generator.manual_seed(key(seed, *stream))
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.manual_seed_all(key(seed, *stream))
        yield

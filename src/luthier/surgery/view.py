"""What a method may see of a tuned model while it trains. `Tuned` and `Tuning` are of these forms."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.core.protocols import Model
from luthier.surgery.unfrozen import Unfrozen

__all__ = ["TunedView", "TuningView"]


class TuningView(Protocol):
    """One tuning.

    Attributes:
        tuning_name: what its user calls it.
        active, trainable: whether it acts, and whether it learns.
        unfrozen: the model's own tensors that it trains, by canonical name.
        masks: "key.short" of an attached tensor -> True where it is not held at zero.
        notes: what the method remembers while it trains, by a name of its own; a stopped run finds it again.
    """

    tuning_name: str
    active: bool
    trainable: bool
    unfrozen: dict[str, Unfrozen]
    masks: dict[str, Tensor]
    notes: dict[str, Tensor]

    def made_by(self, method: object) -> bool:
        """Whether `method` is what this tuning carries out, or a part of it."""

    def modules_by_key(self) -> dict[str, nn.Module]:
        """Canonical key -> module, in the order of registration."""

    def modules(self) -> Iterator[nn.Module]:
        """Every module of it, those inside others too."""


class TunedView(Protocol):
    """A model with tunings.

    Attributes:
        model: the user's model, with everything in place.
        anatomy: what it is made of.
    """

    model: Model
    anatomy: Anatomy

    @property
    def tunings(self) -> Mapping[str, TuningView]:
        """The tunings, by name."""

    def trained(self, name: str | None = None) -> dict[str, nn.Parameter]:
        """Canonical name -> trained tensor, of one tuning, or of all that act and train."""

    def modules(self, kind: type[nn.Module] = nn.Module, *, name: str | None = None) -> dict[str, Any]:
        """Canonical key -> module of the given class, of one tuning or all."""

    def let_rest(self, name: str, modules: Collection[nn.Module]) -> None:
        """Let exactly these attachments of the tuning called `name` sit out from now on; none of them: all act."""

    def tensor(self, name: str) -> nn.Parameter:
        """The model's own tensor of a canonical name, whatever stands around its layer by now."""

    def base_only(self) -> AbstractContextManager[Any]:
        """The base model, for the length of a `with` block."""

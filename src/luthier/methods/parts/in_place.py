"""What methods have in common that train tensors of the model where they stand."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import ConfigError
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import sizes_of
from luthier.surgery import Edit, Method, TunedView, Unfreeze
from luthier.surgery.unfrozen import Unfrozen

__all__ = ["MovesEntries", "ScoredEntries", "TrainsInPlace"]


@dataclass(frozen=True, kw_only=True)
class TrainsInPlace(Method):
    """Trains whole tensors of the model; `tensors()` says which, and all else follows."""

    mergeable: ClassVar[bool] = True
    trains_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 5e-5

    @abstractmethod
    def tensors(self, anatomy: Anatomy) -> Sequence[str]:
        """Names of the tensors that train, a new head left out.

        Raises:
            ConfigError, AnatomyError: there are none, or not these.
        """

    def edits(self, anatomy: Anatomy) -> Iterable[Edit]:
        yield from (Unfreeze(name) for name in self.tensors(anatomy))

    def n_params(self, anatomy: Anatomy) -> int:
        return sum(sizes_of(anatomy, self.tensors(anatomy)))

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("full"):
            return f"{other.name} already trains every number of the model. Use one of them."
        return None


@dataclass(frozen=True, kw_only=True)
class MovesEntries(TrainsInPlace):
    """Trains tensors of the model under a mask, so only some of their entries move."""

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("full", "bitfit"):
            return f"both train tensors of the model in place, {other.name} without a mask. Use one of them."
        return None


@dataclass(frozen=True, kw_only=True)
class ScoredEntries(MovesEntries):
    """The same, and which entries move is told by rows before training."""

    looks_at_data: ClassVar[bool] = True

    def masked(self, tuned: TunedView) -> list[Unfrozen]:
        """The tensors that get a mask, in the order of the model."""
        return own_unfrozen(self, tuned)

    def n_stored(self, anatomy: Anatomy) -> int:
        """New values and their places."""
        return 2 * self.n_params(anatomy)

    def after_backward(self, tuned: TunedView, step: int, total: int) -> None:
        if any(u.mask is None for u in self.masked(tuned)):
            raise ConfigError(f"{self.name}: its mask was never chosen. Call prepare(tuned, batches) before training.")

    @classmethod
    def check_scores(cls, scores: Sequence[Tensor], seen: int) -> None:
        """That so many batches or rows have scored something.

        Raises:
            ConfigError: there were none, a gradient is not finite, or none reached the tensors.
        """
        if seen == 0:
            raise ConfigError(f"{cls.name}: no batch to score with. Give prepare() at least one.")
        if not all(bool(torch.isfinite(s).all()) for s in scores):
            raise ConfigError(f"{cls.name}: a gradient is not finite while scoring. Look at the data or the precision.")
        if not any(bool(s.any()) for s in scores):
            raise ConfigError(
                f"{cls.name}: no gradient reached what it masks, so nothing can be told apart. Check the loss."
            )

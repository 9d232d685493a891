"""What methods have in common that train tensors of the model where they stand."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

from luthier.anatomy import Anatomy
from luthier.methods.parts.update_masks import sizes_of
from luthier.surgery import Edit, Method, Unfreeze

__all__ = ["MovesEntries", "TrainsInPlace"]


class TrainsInPlace(Method):
    """Trains whole tensors of the model; `tensors()` says which, and all else follows."""

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


class MovesEntries(TrainsInPlace):
    """Trains tensors of the model under a mask, so only some of their entries move."""

    def conflicts(self, other: Method) -> str | None:
        if other.is_a("full", "bitfit"):
            return f"both train tensors of the model in place, {other.name} without a mask. Use one of them."
        return None

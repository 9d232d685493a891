"""What methods have in common that attach nothing themselves and change the numbers of the methods beside them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import ConfigError
from luthier.surgery import Edit, Method, Phase

__all__ = ["Modifier", "check_open", "check_worth", "search_and_train"]


@dataclass(frozen=True, kw_only=True)
class Modifier(Method):
    """No edit and no number of its own."""

    modifies: ClassVar[bool] = True

    def edits(self, anatomy: Anatomy) -> Sequence[Edit]:
        return ()

    def n_params(self, anatomy: Anatomy) -> int:
        return 0


def check_open(method: Method, *names: str) -> None:
    """Refuse settings, shares, that are all or nothing.

    Raises:
        ConfigError: with the first of them.
    """
    for name in names:
        value = getattr(method, name)
        if not 0 < value < 1:
            raise ConfigError(f"{method.name}.{name}: {value:g} leaves nothing to choose from. Set it between 0 and 1.")


def check_worth(method: Method, worth: Sequence[Tensor], kept: int) -> None:
    """That entries have scores, and that some are kept.

    Raises:
        ConfigError: no entry has a score, or none would be kept.
    """
    if kept < 1 or not any(bool(w.any()) for w in worth):
        raise ConfigError(
            f"{method.name}: nothing to choose: every score is zero, since nothing had trained or no entry had a "
            "gradient while it was scored, or the share keeps none. Train longer, put it beside a method that trains "
            "what is to be cut down, or set a smaller `warm` or a larger share."
        )


def search_and_train(search: float) -> tuple[Phase, Phase]:
    """A run in two parts: so much of it finds out what to keep, the rest trains that."""
    return Phase(search), Phase(1 - search)

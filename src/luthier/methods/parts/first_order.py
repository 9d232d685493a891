"""LoRA to first order around its start: the update of each module by itself, or the derivative of the whole model.

dW = scale ((B - B0) A0 + B0 (A - A0))          A: (rank, d_in)    B: (d_out, rank)
"""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import AnatomyError, CannotMerge, ConfigError
from luthier.methods.parts.low_rank import MovedUpdate, ThinUpdate
from luthier.methods.parts.row_starts import FromRows
from luthier.methods.parts.starts import Start
from luthier.surgery import Base, move, value_of

__all__ = ["Scope", "check_scope", "check_scoped_sites", "kinds_of"]

Scope = Literal["none", "layer", "model"]
_BOTH_MOVE: tuple[Start, ...] = ("svd", "minor", "qr")
_Kinds = tuple[type[ThinUpdate], type[MovedUpdate], type[FromRows]]


def check_scope(scope: Scope, start: Start, train_a: bool, asked_by: str) -> None:
    """Refuse an A that learns where it would have no gradient, or is not kept apart from B.

    Raises:
        ConfigError: with the starts that let both move.
    """
    if scope != "none" and train_a and start not in _BOTH_MOVE:
        raise ConfigError(
            f"{asked_by}.train_a: true with scope={scope} and start={start}: to first order A has no gradient, or "
            f"cannot be told from B. Set train_a=false, or use start={', '.join(_BOTH_MOVE)}."
        )


def check_scoped_sites(scope: Scope, sites: Iterable[Site], asked_by: str) -> None:
    """Refuse places that no derivative of the last hidden states goes through.

    Raises:
        AnatomyError: with the place.
    """
    for site in sites if scope == "model" else ():
        if site.kind == "head" or site.expert is not None:
            what = "lies behind the last hidden states" if site.kind == "head" else "is an expert's weight"
            raise AnatomyError(f"{asked_by}.sites: {site.key} {what}. Leave it out, or use scope=layer.")


def kinds_of(scope: Scope) -> _Kinds:
    """What stands at a site where A and B act as they are, as far as they have moved, and from where rows say."""
    of_scope: dict[Scope, _Kinds] = {
        "none": (ThinUpdate, MovedUpdate, FromRows),
        "layer": (ThinUpdate, Around, FromRows),
        "model": (AlongThin, AlongAround, AlongRows),
    }
    return of_scope[scope]


class Around(MovedUpdate):
    """Adds `scale * ((B - B0) A0 + B0 (A - A0)) x`."""

    def thin(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.a0, self.a - self.a0]), torch.cat([self.b - self.b0, self.b0], 1)


class _Along(ThinUpdate):
    """The update as a derivative: it goes along with what the layer gives, and changes no value."""

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        a, b = self.thin()
        seen = self.dropout(value_of(x), self.training)
        return move(y, (seen @ a.T @ b.T) * self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        raise CannotMerge("scope=model: a derivative of the model, and no weights do the same. Use scope=layer.")

    def fused(self, base: Base, x: Tensor) -> None:
        """None: a derivative goes along."""

    def still(self, base: Base) -> None:
        """None: a derivative goes along."""

    @classmethod
    def together(cls, members: Any, dtype: torch.dtype) -> None:
        """None: a pass to first order is that of all rows."""


class AlongThin(_Along, ThinUpdate):
    """From zero."""


class AlongAround(_Along, Around):
    """From parts of the weight."""


class AlongRows(_Along, FromRows):
    """From where rows say."""

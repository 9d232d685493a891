"""What a method may do once nothing learns any more: measure, and answer otherwise than by a plain pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.surgery.view import TunedView

__all__ = ["AfterTraining"]


class AfterTraining:
    """Hooks of a `Method` that come after the last step; most methods leave them alone."""

    @classmethod
    def lends(cls, settings: Mapping[str, Any]) -> str | None:
        """Why a saved tuning with these settings is no material for the methods that are made of its kind, or None."""
        return None

    def n_beside(self, others: Sequence[Any], anatomy: Anatomy) -> int:
        """Numbers that a modifier saves beside those of the methods beside it."""
        return 0

    def conclude(
        self, tuned: TunedView, batches: Sequence[Callable[[], Tensor]], held: Sequence[Callable[[], Tensor]] = ()
    ) -> None:
        """After `finish`: measure on the training rows, once, what is saved beside the result. No parameter moves.

        Args:
            held: rows that were held out of training, where the run holds some out: it does where `holds_out` is true.
        """

    def answer(self, tuned: TunedView, forward: Callable[[], Any]) -> Any:
        """Give the `.logits` of one batch in evaluation and prediction; `forward` is the plain pass. Other logits than
        that pass gave are scored anew. Gradients may be taken, and the model is in evaluation mode.
        """
        return forward()

"""When held-out rows are scored inside a run, and what follows from the scores."""

from __future__ import annotations

from contextlib import AbstractContextManager

from luthier.training.early_stopping import Selection
from luthier.training.evaluate import Evaluator

__all__ = ["Evaluations"]


class Evaluations:
    """Scores held-out rows `every` steps apart.

    Args:
        evaluator: scores the rows; None where none are to be scored inside the run.
        every: steps between evaluations; 0, never.
        selection: the best so far, and how long a better one has been waited for.
        at_end: the last step is scored too, whatever `every` says.
    """

    def __init__(self, evaluator: Evaluator | None, every: int, selection: Selection, *, at_end: bool) -> None:
        self.evaluator, self.every, self.selection, self._at_end = evaluator, every, selection, at_end

    def due(self, step: int, total: int) -> bool:
        """Whether the state after `step` is to be scored, and has not been yet."""
        if self.evaluator is None or not self.every or not step or self.selection.at == step:
            return False
        return step % self.every == 0 or (self._at_end and step == total)

    def run(self, step: int, keeping: AbstractContextManager[None]) -> tuple[dict[str, float], bool]:
        """The scores of the model as it would be kept, and whether they are the best so far."""
        assert self.evaluator is not None
        with keeping:
            scores = self.evaluator.scores()
        return scores, self.selection.note(step, scores)

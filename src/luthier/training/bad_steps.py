"""When numbers go wrong: rows are named, no update is made; three times in a row, the run goes back without them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from luthier.core import Diverged
from luthier.data.batches import Batch
from luthier.training.feed import Feed
from luthier.training.guards import NumberGuard

__all__ = ["BadSteps"]


class BadSteps:
    """Judges each step's numbers, and says what follows.

    Args:
        place: names a row of the training table, for messages.
        event: writes to the run's log.
        say: tells the user.
    """

    def __init__(
        self, feed: Feed, place: Callable[[int], str], event: Callable[..., Any], say: Callable[[str], None]
    ) -> None:
        self._feed, self._place, self._event, self._say = feed, place, event, say
        self.guard = NumberGuard()
        self._inside_update: set[int] = set()  # steps whose gradient turned out bad inside their update

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """What is wrong with this step's numbers, or None."""
        return self.guard.judge(loss, float("nan") if step in self._inside_update else norm)

    def skip(self, step: int, wrong: str, losses: Sequence[float], micro_batches: Sequence[Batch]) -> bool:
        """Name the rows of a bad step. True: go on without an update. False: go back without those rows.

        Raises:
            Diverged: the run has gone back for this before.
        """
        guilty = [b for b, loss in zip(micro_batches, losses, strict=True) if not np.isfinite(loss)] or micro_batches
        rows = sorted({int(self._feed.batches.examples.rows[i]) for b in guilty for i in b.rows})
        places = [self._place(r) for r in rows]
        self._event("no_update", step=step + 1, reason=wrong, rows=places[:64], n_rows=len(places))
        self._say(f"step {step + 1}: {wrong}, no update; rows {', '.join(places[:5])}")
        self.guard.suspect(i for b in guilty for i in b.rows)
        if self.guard.in_a_row < self.guard.patience:
            return True
        if self.guard.rollbacks >= 1:
            self._event("diverged", step=step + 1, reason=wrong)
            raise Diverged(
                f"step {step + 1}: {wrong}, {self.guard.patience} times in a row and again after going back. "
                "Stopped; the last good checkpoint stays. Lower the learning rate, or look at the rows in events.jsonl."
            )
        return False

    def leave_out_suspects(self, step: int, wrong: str, go_back: Callable[[], int]) -> None:
        """Take up the last checkpoint, and leave out the rows of the bad steps from there on.

        Args:
            go_back: takes up the last checkpoint, and gives its step. It forgets what is remembered here.
        """
        left_out, suspects, rollbacks = self._feed.left_out, set(self.guard.suspects), self.guard.rollbacks + 1
        back = go_back()
        self._inside_update.clear()  # without those rows the steps to come are others
        self.guard.went_back(rollbacks)
        self._feed.left_out = left_out | suspects
        self._event("rolled_back", from_step=step + 1, to_step=back, reason=wrong, rows_left_out=len(suspects))
        self._say(f"{wrong}: back to step {back}, without {len(suspects)} rows")

    def update_failed(self, step: int, error: ArithmeticError, go_back: Callable[[], int]) -> None:
        """A bad gradient, found when other tensors had moved: go back to where nothing had; skip this step there."""
        self._inside_update.add(step)
        back = go_back()
        self._event("went_back", step=step + 1, to_step=back, reason=f"non-finite gradient of {error}")
        self._say(
            f"step {step + 1}: non-finite gradient of {error} inside the update: back to step {back}, and on "
            "without an update there"
        )

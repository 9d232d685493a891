"""How long steps took, and how wide they were: what a forecast of time is compared with."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from luthier.data.batches import Batch

__all__ = ["StepClock"]


class StepClock:
    """Adds up the steps of this process, but for the first, which warms libraries and memory up.

    Attributes:
        loading: seconds from the model's files to the first step, where whoever builds the run has told them.
    """

    def __init__(self) -> None:
        self.loading = 0.0
        self._begun = False
        self._steps = self._pieces = self._rows = self._targets = 0
        self._seconds = 0.0
        self._tokens = self._squares = 0

    @contextmanager
    def timing(self, micro_batches: Sequence[Batch]) -> Iterator[None]:
        """Around one step."""
        begun = time.perf_counter()
        yield
        if not self._begun:
            self._begun = True
            return
        self._seconds += time.perf_counter() - begun
        self._steps += 1
        for batch in micro_batches:
            rows, width = batch.inputs["input_ids"].shape
            self._pieces += 1
            self._rows += int(rows)
            self._tokens += int(rows * width)
            self._squares += int(rows * width * width)
            self._targets += batch.n_targets

    def told(self) -> dict[str, float]:
        """Means of a step: its seconds, rows, padded tokens, targets and micro-batches, and how wide these were.

        Empty where no step but the first was made.
        """
        if not self._steps or not self._tokens:
            return {}
        n = self._steps
        return {
            "steps": n, "seconds": self._seconds / n, "rows": self._rows / n, "tokens": self._tokens / n,
            "width": self._squares / self._tokens, "pieces": self._pieces / n, "targets": self._targets / n,
            "loading": self.loading,
        }  # fmt: skip

"""Which rows come next: a step's place in its epoch, and the micro-batches that it is cut into."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from luthier.data.batches import Batch, Batches, ahead, cut
from luthier.data.examples import Examples
from luthier.runs.spec import RunSpec

__all__ = ["Feed"]


class Feed:
    """Cuts steps into micro-batches, ahead of the loop where workers are wanted.

    Attributes:
        origin: an epoch, and the step it began at; moves where the batch size changes.
        budget: padded tokens of a micro-batch; halved when memory runs out.
        left_out: examples that a roll-back left out.
    """

    def __init__(self, spec: RunSpec, batches: Batches) -> None:
        self.batches = batches
        self._spec = spec
        self.origin: tuple[int, int] = (0, 0)
        self.budget = spec.batch.tokens
        self.left_out: set[int] = set()

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        epoch, step = self.origin
        if self._spec.steps is not None or step == 0:
            return self._spec.total_steps(self.batches.order.steps_per_epoch)
        whole = self._spec.total_steps(1) if self._spec.epochs is None else self._spec.epochs
        return step + max(0, round((whole - epoch) * self.batches.order.steps_per_epoch))

    def at(self, step: int) -> tuple[int, int]:
        """(epoch, step in it)."""
        epoch, first = self.origin
        epochs, inside = divmod(step - first, self.batches.order.steps_per_epoch)
        return epoch + epochs, inside

    def ahead(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches) from `start` to `stop`, prepared ahead by the workers."""

        def make(step: int) -> tuple[int, list[Batch]]:
            return self.budget, self.cut(step)

        for step, (budget, micro_batches) in ahead(make, range(start, stop), self.batches.workers):
            yield step, micro_batches if budget == self.budget else self.cut(step)

    def rows(self, step: int) -> NDArray[np.int64]:
        """The examples of a step, less those left out."""
        rows = self.batches.order.rows(*self.at(step))
        return np.asarray([i for i in rows.tolist() if i not in self.left_out], dtype=np.int64)

    def cut(self, step: int) -> list[Batch]:
        """The micro-batches of a step: its rows, less those left out, cut to the budget. May be empty."""
        when = self.at(step)
        pieces = self.batches.pieces(*when, self.budget)
        if self.left_out:
            pieces = [np.asarray([i for i in p if int(i) not in self.left_out], dtype=np.int64) for p in pieces]
        return [self.batches.batch(p, when) for p in pieces if len(p)]

    def cut_rows(self, rows: NDArray[np.int64], when: tuple[int, ...] = ()) -> list[Batch]:
        """Micro-batches of any examples, cut to the budget; `when` names what is drawn of them."""
        collator, examples = self.batches.collator, self.batches.examples
        pieces = cut(rows, examples.lengths, self.budget, len(rows), collator.pad_to) if len(rows) else []
        return [collator(examples, piece, when) for piece in pieces]

    def lay(self, examples: Examples) -> list[Batch]:
        """Micro-batches of examples that are none of the run's rows, cut to the budget."""
        collator, lengths = self.batches.collator, examples.lengths
        most = max(1, -(-len(lengths) // self.batches.accumulate))
        everything = np.arange(len(lengths), dtype=np.int64)
        return [collator(examples, piece) for piece in cut(everything, lengths, self.budget, most, collator.pad_to)]

    def longest(self) -> Batch:
        """The widest micro-batch of the whole run."""
        return self.batches.longest()

    def fitting(self, longest: Batch) -> Batch:
        """As many of the widest rows as the budget now holds, one at least."""
        fits = max(1, self.budget // longest.inputs["input_ids"].shape[1])
        return self.batches.batch(longest.rows[:fits])

"""What a method sees of the training rows, before the first step or after the last."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from luthier.data.batches import EvalBatches
from luthier.data.examples import Examples
from luthier.surgery import Look, OneRow
from luthier.training.loop import Loop

__all__ = ["Looks", "held_looks"]


SAID = 15.0
"""Seconds between two words of how far a look is: it may take longer than the run."""


class Looks(Sequence[Look]):
    """The steps of the first epoch, each with the graph of its mean loss."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._said = time.monotonic()

    def __len__(self) -> int:
        return self._loop.feed.batches.order.steps_per_epoch

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        loop, step = self._loop, index % len(self)
        n_targets = max(1, loop.feed.batches.n_targets(0, step))

        def seen(rows: NDArray[np.int64]) -> OneRow:
            self._say(step)
            return _seen(loop, loop.feed.batches.examples, rows)

        def look(rows: NDArray[np.int64]) -> Tensor:
            return seen(rows).loss / n_targets

        rows = np.split(held := loop.feed.batches.order.rows(0, step), len(held))
        pieces = loop.feed.batches.pieces(0, step, loop.feed.budget)
        return Look(
            [partial(look, piece) for piece in pieces],
            [partial(seen, row) for row in rows],
            [partial(seen, piece) for piece in pieces],
        )

    def _say(self, step: int) -> None:
        now = time.monotonic()
        if now - self._said >= SAID:
            self._said = now
            self._loop.listener.say(f"looking at step {step + 1} of {len(self)}")


def held_looks(loop: Loop, examples: Examples) -> list[Look]:
    """Rows that nothing learns from, in batches as wide as a step's micro-batches."""
    found = []
    for piece in EvalBatches(examples, loop.feed.batches.collator, loop.spec.batch.tokens).pieces():
        once = partial(_seen, loop, examples, piece)
        found.append(Look([partial(_mean, once, len(piece))], (), [once]))
    return found


def _seen(loop: Loop, examples: Examples, rows: NDArray[np.int64]) -> OneRow:
    loop.signals.check()
    batch = loop.feed.batches.collator(examples, rows).to(loop.device)
    with loop.precision.autocast(loop.device):
        result = loop.objective(batch)
    return OneRow(result.loss, result.logits, batch.labels)


def _mean(once: Callable[[], OneRow], n: int) -> Tensor:
    return once().loss / n

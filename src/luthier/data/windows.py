"""A row that is longer than the model reads, in windows: each is read as a row, and their answers are averaged.

In training a row gives one of its windows in each epoch, in turn from a drawn one on. So every row counts once however
long it is, its windows count alike, and all of them have been read after as many epochs as it has windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, key
from luthier.data.examples import Examples
from luthier.data.order import Order
from luthier.data.tasks import Task

__all__ = ["OneWindowOfEach", "mean_by_row", "refuse_windows", "windows"]

OVERLAP = 4
"""A window shares one part in so many with the next one."""
LEAST = 4
"""The text that is read in windows has one part in so many of each, or the other text leaves it too little."""


def refuse_windows(task: Task, tokenizer: Any) -> None:
    """Raises: ConfigError: rows that are not read in windows, or a tokenizer that does not say which text an id is of.

    >>> refuse_windows(Task(name="seq2seq"), None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    luthier.core.errors.ConfigError: long: windows need rows with one answer each, ...
    """
    if task.name not in ("classification", "regression"):
        why = {
            "causal_lm": "Plain text is learnt in pieces anyway, and a prompt with its answer is cut",
            "masked_lm": "Text is learnt in pieces anyway",
            "span_corruption": "Text is learnt in pieces anyway",
            "token_classification": "Tags of long rows are predicted in windows anyway; in training they are cut",
        }.get(task.name, "An answer is written to a whole prompt")
        raise ConfigError(
            f"long: windows need rows with one answer each, whose parts can be averaged; this is {task.name}. {why}. "
            "Leave --long out, or split long rows before."
        )
    if task.template:
        raise ConfigError(
            "long: a template has one gap in one text, so a row that is too long for it is cut. Leave --long out."
        )
    if not tokenizer.is_fast:
        raise ConfigError(
            f"long: {type(tokenizer).__name__} does not say where a text's tokens begin and end, which windows need. "
            "Leave --long out, or take a model with a tokenizer.json."
        )


def windows(of: Sequence[int | None], max_length: int) -> list[NDArray[np.int64]]:
    """The positions that each window of a row reads, in order; the last window ends where the row does.

    Of a pair the longer text is read in windows, and the other one stands in each.

    >>> [w.tolist() for w in windows([None, 0, 0, 0, 0, 0, None], 5)]
    [[0, 1, 2, 3, 6], [0, 3, 4, 5, 6]]

    Args:
        of: for each id of the row the text it is of, 0 or 1; None for what the tokenizer adds.

    Returns:
        None at all where the other text leaves too little room.
    """
    texts = np.asarray([-1 if text is None else text for text in of])
    moving = int((texts == 1).sum() > (texts == 0).sum())
    theirs = np.flatnonzero(texts == moving)
    room = max_length - (len(texts) - len(theirs))
    if room < max(2, max_length // LEAST):
        return []
    overlap = room // OVERLAP
    count = -(-(len(theirs) - overlap) // (room - overlap))
    starts = np.linspace(0, len(theirs) - room, count).round().astype(np.int64)
    others = np.flatnonzero(texts != moving)
    return [np.sort(np.concatenate([others, theirs[start : start + room]])) for start in starts]


class OneWindowOfEach(Order):
    """An order of rows, as one of examples: of each row its next window.

    Args:
        rows: an order of the rows' numbers.
        examples: windows of one row follow one another.
    """

    def __init__(self, rows: Order, examples: Examples) -> None:
        super().__init__(rows.lengths, rows.size, rows.seed)
        self._rows, self._first = rows, examples.firsts
        self._count = np.diff(np.append(self._first, len(examples)))  # (rows,)
        drawn = np.random.Philox(key(rows.seed, "windows")).random_raw(len(self._count))
        self._start = (drawn % self._count.astype(np.uint64)).astype(np.int64)

    @property
    def steps_per_epoch(self) -> int:
        return self._rows.steps_per_epoch

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        rows = self._rows.rows(epoch, step)
        return np.asarray(self._first[rows] + (self._start[rows] + epoch) % self._count[rows])


def mean_by_row(values: NDArray[Any], examples: Examples) -> NDArray[Any]:
    """The mean over the windows of each row: (examples, n) to (rows, n)."""
    first = examples.firsts
    if len(first) == len(values):
        return values
    counts = np.diff(np.append(first, len(values)))
    return np.asarray(np.add.reduceat(values, first, axis=0) / counts[:, None], dtype=values.dtype)

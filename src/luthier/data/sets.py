"""Rows of several sets in one table: those that are learnt, then further ones that strategies ask for by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, DataError
from luthier.data.columns import Columns, find_columns, is_blank, label_name
from luthier.data.examples import Examples
from luthier.data.order import ChosenOrder, Order, again_and_again, shuffled
from luthier.data.rows import Row, Table, load_rows
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec

__all__ = [
    "TRAIN",
    "Further",
    "Sets",
    "equal_shares",
    "join",
    "load_further",
    "named_sources",
    "others_beside",
    "with_others",
]

TRAIN = "train"


@dataclass(frozen=True)
class Sets:
    """Which examples are of which set. The first set is "train"; examples of a set follow one another.

    Args:
        names: of the sets, in order.
        starts: the example at which each begins, and one more number, the end.
    """

    names: tuple[str, ...]
    starts: tuple[int, ...]

    @classmethod
    def of(cls, examples: Examples, sizes: Mapping[str, int]) -> Sets:
        """The sets of a table that holds so many rows of each, one set after another."""
        edges = np.concatenate([[0], np.cumsum(np.asarray([*sizes.values()], dtype=np.int64))])
        return cls(tuple(sizes), tuple(int(i) for i in np.searchsorted(examples.rows, edges)))

    @property
    def further(self) -> tuple[str, ...]:
        """The names of the sets beside "train"."""
        return self.names[1:]

    def rows(self, name: str) -> NDArray[np.int64]:
        """The examples of a set."""
        number = self.names.index(name)
        return np.arange(self.starts[number], self.starts[number + 1], dtype=np.int64)

    def numbers(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """For each example the number of its set."""
        return np.searchsorted(np.asarray(self.starts[1:]), rows, side="right").astype(np.int64)


@dataclass(frozen=True)
class Further:
    """One further set, its columns called as those of the run."""

    name: str
    table: Table = field(repr=False)
    fingerprint: str
    notes: tuple[str, ...] = ()
    new_labels: tuple[str, ...] = ()
    """labels that the rows of the run do not have"""


def equal_shares(usual: Order, sets: Sets, stream: str) -> Order:
    """Steps that hold the same number of rows of each set; an epoch is one pass over the first set.

    Args:
        stream: names the draws.
    """
    each = max(1, usual.size // len(sets.names))
    steps = -(-len(sets.rows(sets.names[0])) // each)

    @lru_cache(maxsize=2)
    def laid_out(epoch: int) -> NDArray[np.int64]:
        parts = []
        for number, rows in enumerate(map(sets.rows, sets.names)):
            drawn = again_and_again(rows, steps * each, usual.seed, stream, number, epoch)
            parts.append(drawn.reshape(steps, each))
        return np.concatenate(parts, axis=1)  # (steps, sets * each)

    return ChosenOrder(usual, lambda epoch, step: np.unique(laid_out(epoch)[step]), steps)


def with_others(usual: Order, others: NDArray[np.int64], ratio: float, stream: str) -> Order:
    """Steps that hold, beside their usual rows, so many times as many others, drawn anew for each; none comes twice.

    Args:
        others: the examples to draw from.
        stream: names the draws.
    """

    def choose(epoch: int, step: int) -> NDArray[np.int64]:
        new = usual.rows(epoch, step)
        mixed = shuffled(len(others), usual.seed, stream, epoch, step)
        return np.concatenate([new, others[mixed[: others_beside(len(new), len(others), ratio)]]])

    return ChosenOrder(usual, choose)


def others_beside(usual: int, most: int, ratio: float) -> int:
    """How many other rows stand beside so many usual ones."""
    return min(most, round(ratio * usual))


def named_sources(words: Sequence[str] | None) -> dict[str, str]:
    """`old=before.csv` as name and source.

    Raises:
        ConfigError: a word that is not of this form, or a name twice.
    """
    found: dict[str, str] = {}
    for word in words or ():
        name, sign, source = (part.strip() for part in word.partition("="))
        if not sign or not source or not name.isidentifier():
            raise ConfigError(f"also {word!r}: name a set and its rows, such as old=before.csv.")
        if name in found or name == TRAIN:
            taken = "are the rows of data.source" if name == TRAIN else "stand there twice"
            raise ConfigError(f"also {word!r}: rows called {name!r} {taken}. Choose another name.")
        found[name] = source
    return found


def load_further(name: str, source: str, spec: DataSpec, columns: Columns, task: Task, test: Table | None) -> Further:
    """Read a further set. Rows whose text also stands in the test half are set aside, so that none is learnt.

    Raises:
        DataError: no rows of the same shape.
    """
    table, _ = load_rows(source, **spec.stored(source))
    theirs = find_columns(table, spec, task.name)
    if theirs.used().keys() != columns.used().keys():
        raise DataError(
            f"also.{name}: {source} has {', '.join(theirs.used())}, and the rows of the run have "
            f"{', '.join(columns.used())}. A further set has the same parts; give their columns the same names."
        )
    names = {column: theirs.used()[role] for role, column in columns.used().items()}
    rows: list[Row] = [{ours: row.get(of_set) for ours, of_set in names.items()} for row in table.rows]
    whole = Table(rows, table.places, f"{table.source} (also.{name})")
    held = {columns.content(row) for row in test.rows} if test is not None else set()
    kept = [i for i, row in enumerate(rows) if columns.content(row) not in held]
    notes = [f"also.{name}: {len(kept)} rows of {source}"]
    if len(kept) < len(rows):
        notes.append(f"also.{name}: {len(rows) - len(kept)} rows also stand in the test half; they are set aside")
    if not kept:
        raise DataError(f"also.{name}: every row of {source} also stands in the test half. Name other rows.")
    new: set[str] = set()
    if task.name == "classification" and not task.multi_label and columns.label is not None:
        marks = [rows[i].get(columns.label) for i in kept]
        new = {label_name(mark) for mark in marks if not is_blank(mark)} - set(task.labels)
        if new:
            notes.append(f"also.{name}: labels that the run's own rows lack: {', '.join(map(repr, sorted(new)))}")
    return Further(name, whole.take(kept), table.fingerprint(), tuple(notes), tuple(sorted(new)))


def join(table: Table, task: Task, further: Sequence[Further]) -> tuple[Table, Task]:
    """All sets in one table, "train" first; labels that only a further set has follow those of the task."""
    rows, places = list(table.rows), list(table.places)
    for one in further:
        rows += one.table.rows
        places += one.table.places
    new = sorted({label for one in further for label in one.new_labels})
    if new:
        task = replace(task, labels=(*task.labels, *new))
    return Table(rows, places, table.source, table.notes), task

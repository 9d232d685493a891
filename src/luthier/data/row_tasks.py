"""Which task each row is of: a column of names, as whole numbers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from luthier.core import DataError, near
from luthier.data.columns import label_name
from luthier.data.examples import Examples
from luthier.data.rows import Table

__all__ = ["task_names", "with_tasks"]


def task_names(table: Table, column: str) -> tuple[str, ...]:
    """The tasks of the training rows, sorted.

    Raises:
        DataError: a row does not say which task it is of.
    """
    return tuple(sorted({_name(table, row, column) for row in range(len(table))}))


def with_tasks(examples: Examples, column: str, names: Sequence[str]) -> Examples:
    """Examples that say which task each is of.

    Raises:
        DataError: a row of none, or of one that training does not have.
    """
    table, numbers = examples.ledger.table, {name: i for i, name in enumerate(names)}
    found = np.zeros(len(table), dtype=np.int64)
    for row in range(len(table)):
        name = _name(table, row, column)
        if name not in numbers:
            raise DataError(
                f"{table.places[row]}: the task {name!r} (column {column!r}) is not among those of the training rows: "
                f"{', '.join(names)}.{near(name, list(names))} Train with rows of it, or leave the row out."
            )
        found[row] = numbers[name]
    return replace(examples, facts={"task": found[examples.rows]})


def _name(table: Table, row: int, column: str) -> str:
    value = table.rows[row].get(column)
    name = "" if value is None else label_name(value)
    if not name:
        raise DataError(
            f"{table.places[row]}: nothing in column {column!r}, which says which task a row is of. Fill it in."
        )
    return name

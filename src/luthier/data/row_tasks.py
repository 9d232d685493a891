"""Which task each row is of: a column of names, as whole numbers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from luthier.core import ConfigError, DataError, near
from luthier.data.columns import Columns, label_name
from luthier.data.examples import Examples
from luthier.data.label_cells import label_names, of_task
from luthier.data.rows import Table
from luthier.data.tasks import Task

__all__ = ["task_names", "with_heads", "with_tasks"]


def task_names(table: Table, column: str) -> tuple[str, ...]:
    """The tasks of the training rows, sorted.

    Raises:
        DataError: a row does not say which task it is of.
    """
    return tuple(sorted({_name(table, row, column) for row in range(len(table))}))


def with_heads(task: Task, table: Table, columns: Columns, names: Sequence[str]) -> Task:
    """The task with labels of their own for each task of the rows, called "task: label".

    Labels of one task are not answers to another: a row is answered among those of its own.

    Raises:
        ConfigError: rows that have not one label each, or a task of one label.
    """
    if task.name != "classification" or task.multi_label or task.template or task.written:
        raise ConfigError(f"heads for each task are for rows with one label each, by a head; this is {task.name}.")
    of: dict[str, set[str]] = {name: set() for name in names}
    for row, label in zip(table.rows, label_names(table, columns), strict=True):
        of[label_name(row[columns.row_task or ""])].add(of_task(row, columns, label))
    for name, labels in of.items():
        if len(labels) < 2:
            raise ConfigError(f"the task {name!r} has one label, {min(labels)!r}: nothing is learnt. Leave it out.")
    every = [label for name in names for label in sorted(of[name])]
    heads = tuple(tuple(every.index(label) for label in sorted(of[name])) for name in names)
    return replace(task, labels=tuple(every), heads=heads)


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

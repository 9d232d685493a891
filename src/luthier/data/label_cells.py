"""What stands in the cells of the label column: names, lists of names, numbers, or one 0 or 1 for each label."""

import ast
import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from luthier.core import DataError
from luthier.data.columns import Columns, cell, is_blank, label_name
from luthier.data.rows import Row, Table

__all__ = [
    "as_number",
    "each",
    "filled",
    "has_decimal_commas",
    "indicated",
    "indicators",
    "is_list",
    "label_lists",
    "label_names",
    "labels_are_measures",
    "numbers_of",
    "of_task",
    "refuse_unknown",
    "some",
    "sorted_names",
    "written_list",
]

T = TypeVar("T")

MOST_COMPLAINTS = 10
MOST_LIST_CHARS = 100_000

_COMMA_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")


def filled(table: Table, columns: Columns) -> list[Any]:
    """The label cells; a missing one is an error that names its place."""
    column = columns.label
    assert column is not None
    if not all(column in row for row in table.rows):
        for i in range(len(table)):
            cell(table, i, column)  # names the first row that lacks it
    values = [row[column] for row in table.rows]
    empty = [table.places[i] for i, blank in enumerate(each(values, is_blank)) if blank]
    if empty:
        raise DataError(
            f"{len(empty)} rows have no label in column {columns.label!r}: {some(empty)}."
            " Fill the column in, or remove these rows."
        )
    return values


def some(places: Sequence[str]) -> str:
    more = f" and {len(places) - MOST_COMPLAINTS} more" if len(places) > MOST_COMPLAINTS else ""
    return ", ".join(places[:MOST_COMPLAINTS]) + more


def each(values: Sequence[Any], ask: Callable[[Any], T]) -> list[T]:
    """`ask` of every cell. Where all are text, it is asked once of each different one: labels are few, rows many."""
    if set(map(type, values)) == {str}:
        known = {value: ask(value) for value in set(values)}
        return [known[value] for value in values]
    return [ask(value) for value in values]


def is_list(value: Any) -> bool:
    """Whether a cell holds several labels: a list, or (from a CSV) the JSON of one."""
    if isinstance(value, str):
        return written_list(value) is not None
    return isinstance(value, list | tuple)


def written_list(text: str) -> list[Any] | None:
    """The list that a cell of text holds, as JSON or as Python prints it; None where it holds none.

    Python's form is read as data: constants alone, and nothing is evaluated.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MOST_LIST_CHARS:
        return None  # also a name that begins with a bracket
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return found if isinstance(found, list) else None


def _as_list(value: Any, place: str) -> list[str]:
    if isinstance(value, str):
        found = written_list(value)
        if found is None:
            raise DataError(
                f'{place}: {value!r} is no list of labels. Write several labels as ["a", "b"] (JSON), none as [].'
            )
        value = found
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: the label {value!r} is one value where other rows have a list. Write it as a list.")
    return [label_name(v) for v in value]


def label_names(table: Table, columns: Columns) -> list[str]:
    values = filled(table, columns)
    lists = [table.places[i] for i, is_list in enumerate(each(values, is_list)) if is_list]
    if lists:
        raise DataError(
            f"{len(lists)} rows have a list in column {columns.label!r} where the task has one label a row:"
            f" {some(lists)}. Write one label, or lists in the training rows too."
        )
    return each(values, label_name)


def of_task(row: Row, columns: Columns, label: str) -> str:
    """What a label of a row's own task is called among those of several tasks."""
    return f"{label_name(row[columns.row_task or ''])}: {label}"


def label_lists(table: Table, columns: Columns) -> list[list[str]]:
    return [_as_list(v, p) for v, p in zip(filled(table, columns), table.places, strict=True)]


def sorted_names(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value ("2" before "10"), other names by the alphabet."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def as_number(value: Any, comma: bool = False) -> float | None:
    if isinstance(value, bool | list | tuple | dict):
        return None
    if comma and isinstance(value, str):
        value = value.replace(".", "").replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _written_as_fraction(value: Any) -> bool:
    """Whether a cell is a number with a fraction part by type: 4.0 and "4.0" are, 4 and "4" are not."""
    if isinstance(value, str):
        return any(mark in value for mark in ".eE")
    return isinstance(value, float)


def has_decimal_commas(values: Sequence[Any]) -> bool:
    """Whether all labels are numbers as Germany writes them, 1.234,5 or 3,0, and one at least has a comma."""
    texts = [v.strip() for v in values if isinstance(v, str)]
    return len(texts) == len(values) and any("," in v for v in texts) and all(map(_COMMA_NUMBER.fullmatch, texts))


def labels_are_measures(table: Table, columns: Columns) -> bool:
    """Regression, if every label is a number and one at least is no whole number; else classes."""
    values = filled(table, columns)
    if has_decimal_commas(values):
        return True
    return None not in each(values, as_number) and any(each(values, _is_fraction))


def _is_fraction(value: Any) -> bool:
    number = as_number(value)
    return number is not None and _written_as_fraction(value) and not number.is_integer()


def indicators(values: Sequence[Any]) -> int:
    """How many labels there are where each row holds one 0 or 1 for each; 0 where rows hold something else."""
    widths: set[int] = set()
    seen: set[Any] = set()
    for value in values:
        found = written_list(value) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or not all(isinstance(v, int | float) for v in found):
            return 0
        widths.add(len(found))
        seen.update(found)
    return widths.pop() if len(widths) == 1 and seen and seen <= {0, 1} and widths != {0} and widths != {1} else 0


def indicated(table: Table, columns: Columns, n_labels: int) -> list[list[str]]:
    """Names of the labels whose place holds a 1: the number of the place."""
    rows = []
    for value, place in zip(filled(table, columns), table.places, strict=True):
        found = written_list(value) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or len(found) != n_labels or not set(found) <= {0, 1}:
            raise DataError(
                f"{place}: {value!r} should hold one 0 or 1 for each of {n_labels} labels, as the training rows do."
            )
        rows.append([str(at) for at, on in enumerate(found) if on])
    return rows


def numbers_of(table: Table, columns: Columns, comma: bool = False) -> NDArray[np.float32]:
    values = filled(table, columns)
    numbers = [as_number(v, comma) for v in values]
    wrong = [f"{table.places[i]} ({values[i]!r})" for i, n in enumerate(numbers) if n is None]
    if wrong:
        raise DataError(
            f"{len(wrong)} values in column {columns.label!r} are no finite numbers, which regression needs:"
            f" {some(wrong)}. Correct them, or use --task classification."
        )
    return np.asarray(numbers, dtype=np.float32)


def refuse_unknown(table: Table, names: Sequence[Sequence[str]], number: dict[str, int]) -> None:
    wrong = [f"{table.places[i]} ({n!r})" for i, row in enumerate(names) for n in row if n not in number]
    if wrong:
        raise DataError(
            f"{len(wrong)} labels are not among those of the training rows ({some(list(number))}): {some(wrong)}."
            " No model can learn them from these rows. Correct them, or move some of those rows to the training half."
        )

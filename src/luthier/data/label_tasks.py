"""The tasks of rows with a label: classes, several labels a row, and numbers."""

import difflib
import json
from collections import Counter
from collections.abc import Mapping

import numpy as np

from luthier.core import DataError
from luthier.data.columns import Columns, reads_like_no_label
from luthier.data.label_cells import (
    as_number,
    filled,
    has_decimal_commas,
    indicated,
    indicators,
    is_list,
    label_lists,
    label_names,
    numbers_of,
    sorted_names,
)
from luthier.data.rows import Table
from luthier.data.tasks import Task

__all__ = ["classification", "look_alikes", "regression"]

SHOWN_CLASSES = 12


def classification(table: Table, columns: Columns) -> Task:
    values = filled(table, columns)
    if n_labels := indicators(values):
        rows = indicated(table, columns, n_labels)
        if all(len(row) == n_labels for row in rows):
            raise DataError(f"{table.source}: every row has every label: there is nothing to learn.")
        return Task(
            name="classification",
            labels=tuple(str(at) for at in range(n_labels)),
            multi_label=True,
            written="indicators",
            notes=(
                f"{n_labels} labels, several a row: each row holds a 0 or 1 for each, and they are called by their "
                "places, from 0",
            ),
        )
    if is_list(values[0]):
        lists = label_lists(table, columns)
        labels = sorted_names({name for row in lists for name in row})
        if not labels:
            raise DataError(
                f"{table.source}: column {columns.label!r} holds only empty lists: there is nothing to learn."
                " Check that it is the column with the labels."
            )
        return Task(
            name="classification",
            labels=labels,
            multi_label=True,
            notes=(f"{len(labels)} labels, several a row: the labels are lists",),
        )
    names = label_names(table, columns)
    counts = Counter(names)
    labels = sorted_names(set(counts))
    if len(labels) == 1:
        raise DataError(
            f"{table.source}: all {len(table)} labels in column {columns.label!r} are {labels[0]!r}: with one class"
            " there is nothing to learn. Add rows of another class, or name another column with --label."
        )
    odd = [i for i, v in enumerate(values) if as_number(v) is None]
    all_numbers = not odd
    once = sum(count == 1 for count in counts.values())
    if len(labels) > 20 and once > len(labels) / 2:
        advice = "--task regression" if all_numbers else "another column with --label"
        if 0 < len(odd) <= len(values) / 10:
            raise DataError(
                f"{table.source}: column {columns.label!r} holds numbers, but {len(odd)} of {len(values)} values are "
                f"none: {names[odd[0]]!r} at {table.places[odd[0]]}. Write it as a number, such as 3.5, and use --task "
                "regression."
            )
        raise DataError(
            f"{table.source}: column {columns.label!r} has {len(labels)} different values in {len(table)} rows and"
            f" {once} of them occur once (such as {names[0]!r}): these are no classes. Use {advice}."
        )
    notes = [f"{len(labels)} classes", _counted(counts)]
    if all_numbers:
        notes = [
            f"{len(labels)} classes: the labels are whole numbers, read as classes (--task regression for measures)",
            _counted(counts),
        ]
    notes += _doubtful(counts)
    return Task(name="classification", labels=labels, notes=tuple(notes))


def _counted(counts: Counter[str]) -> str:
    """Rows of each class, the largest first."""
    shown = ", ".join(f"{name} {n}" for name, n in counts.most_common(SHOWN_CLASSES))
    left = len(counts) - SHOWN_CLASSES
    return f"rows of each class: {shown}" + (f", and {left} more classes" if left > 0 else "")


def _doubtful(counts: Counter[str]) -> list[str]:
    """What looks like a slip in the labels: classes that differ in case, blanks or a letter, and several in one."""
    notes = []
    groups = look_alikes(counts)
    if groups:
        shown = "; ".join(", ".join(f"{n!r} {counts[n]}" for n in group) for group in groups[:5])
        notes.append(f"labels that look alike are kept apart: {shown}. If they are one class, write it one way")
    none = [name for name in counts if reads_like_no_label(name)]
    if none:
        shown = ", ".join(f"{name!r} {counts[name]}" for name in none[:5])
        notes.append(f"learnt as a class, though it reads like none: {shown}. If it is none, empty these cells")
    joined = {name: {part.strip() for part in name.split(",")} for name in counts if "," in name}
    times = Counter(part for name in counts for part in joined.get(name, {name}))
    several = next((name for name, parts in joined.items() if any(times[part] > 1 for part in parts)), None)
    if several is not None:
        notes.append(
            f"labels such as {several!r} are read as one class each. If they are several labels of a row, write them "
            f"as a list: {json.dumps(sorted(joined[several]))}"
        )
    return notes


def look_alikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Classes that may be one: they differ in case, blanks or a letter. Of each group the largest comes first."""
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault("".join(ch for ch in name.casefold() if ch.isalnum()) or name, []).append(name)
    groups = [sorted(names, key=lambda n: -counts[n]) for names in alike.values() if len(names) > 1]
    taken = {name for group in groups for name in group}
    whole = sum(counts.values())
    rare = [n for n in counts if counts[n] <= max(2, whole // 100) and n not in taken and len(n) >= 5]
    for name in rare[:SHOWN_CLASSES]:
        larger = [other for other in counts if counts[other] > 4 * counts[name]]
        groups += [[found, name] for found in difflib.get_close_matches(name, larger, 1, 0.85)]
    return groups


def regression(table: Table, columns: Columns) -> Task:
    comma = has_decimal_commas(filled(table, columns))
    numbers = numbers_of(table, columns, comma)
    if np.all(numbers == numbers[0]):
        raise DataError(
            f"{table.source}: all {len(table)} numbers in column {columns.label!r} are {numbers[0]:g}: there is nothing"
            " to learn. Name another column with --label."
        )
    low, high = float(numbers.min()), float(numbers.max())
    center, scale = float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64))
    said = f"regression: numbers from {low:g} to {high:g}" + (", written with decimal commas" if comma else "")
    return Task(
        name="regression",
        written="decimal_comma" if comma else "",
        center=center,
        scale=scale,
        notes=(f"{said}; learnt with mean {center:g} and deviation {scale:g} taken out, answered in their own unit",),
    )

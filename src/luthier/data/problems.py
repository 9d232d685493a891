"""Rows that somebody should look at: repeated, contradictory, set aside, or of a class that may be none."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.columns import Columns, reads_like_no_label
from luthier.data.label_tasks import look_alikes
from luthier.data.rows import Row, Table
from luthier.data.tasks import Task

__all__ = ["FILE", "Problem", "find_problems", "problems_csv", "problems_said", "text_of"]

FILE = "problems.csv"
MOST = 20_000
"""Rows that are listed; more are counted in the last line of the file."""

ASIDE, REPEATED, IN_BOTH = "set aside", "repeated", "in both halves"
SEVERAL, NO_LABEL, ALIKE = "several labels", "label reads like none", "label looks like another"
KINDS = {
    ASIDE: "set aside",
    REPEATED: "repeated",
    IN_BOTH: "of test also in train",
    SEVERAL: "of texts with several labels",
    NO_LABEL: "with a label that reads like none",
    ALIKE: "with a label that looks like another",
}
"""Kind -> how its rows are counted in a sentence."""


@dataclass(frozen=True)
class Problem:
    """One row, one thing about it."""

    place: str
    kind: str
    text: str
    about: str
    """the reason, the other place, or the labels"""


def find_problems(
    train: Table, test: Table | None, aside: Iterable[tuple[str, str, str]], columns: Columns, task: Task, *,
    any_twice: bool,
) -> tuple[Problem, ...]:  # fmt: skip
    """What there is to look at, by kind and in the order of the rows.

    Args:
        train, test: the rows that are used.
        aside: place, reason and text of those that are not.
        any_twice: whether a content occurs twice at all; where none does, contents are not compared again.
    """
    found = [Problem(place, ASIDE, text, why) for place, why, text in aside]
    if any_twice:
        found += _repeated(train, test, columns)
    if task.name == "classification" and not task.multi_label:
        found += _doubtful_labels(train, test, columns)
    return tuple(found)


def _repeated(train: Table, test: Table | None, columns: Columns) -> list[Problem]:
    tables = [train] if test is None else [train, test]
    contents = [[columns.content(row) for row in table.rows] for table in tables]
    times = Counter(same for half in contents for same in half)
    labels: dict[str, Counter[str]] = {}
    for table, half in zip(tables, contents, strict=True):
        for row, same in zip(table.rows, half, strict=True):
            if times[same] > 1:
                labels.setdefault(same, Counter())[columns.outcome(row)] += 1
    found = []
    in_train: dict[str, str] = {}
    for number, (table, half) in enumerate(zip(tables, contents, strict=True)):
        first: dict[str, str] = {}
        copies: dict[str, str] = {}
        for row, place, same in zip(table.rows, table.places, half, strict=True):
            if times[same] == 1:
                continue
            text = text_of(row, columns)
            if number and same in in_train:
                found.append(Problem(place, IN_BOTH, text, f"also {in_train[same]}"))
            elif (whole := columns.whole(row)) in copies:
                found.append(Problem(place, REPEATED, text, f"first {copies[whole]}"))
            first.setdefault(same, place)
            copies.setdefault(columns.whole(row), place)
            if len(labels[same]) > 1:
                counted = ", ".join(f"{name} {n}" for name, n in labels[same].most_common())
                found.append(Problem(place, SEVERAL, text, f"{columns.outcome(row)}; of all: {counted}"))
        in_train = in_train or first
    order = list(KINDS)
    return sorted(found, key=lambda p: order.index(p.kind))


def _doubtful_labels(train: Table, test: Table | None, columns: Columns) -> list[Problem]:
    tables = [train] if test is None else [train, test]
    rows = [(row, place) for table in tables for row, place in zip(table.rows, table.places, strict=True)]
    names = [columns.outcome(row) for row, _ in rows]
    counts = Counter(names)
    about = {name: (NO_LABEL, name) for name in counts if reads_like_no_label(name)}
    for first, *others in look_alikes(counts):
        about |= {name: (ALIKE, f"{name}; larger: {first} {counts[first]}") for name in others}
    return [
        Problem(place, about[name][0], text_of(row, columns), about[name][1])
        for kind in (NO_LABEL, ALIKE)
        for name, (row, place) in zip(names, rows, strict=True)
        if name in about and about[name][0] == kind
    ]


def text_of(row: Row, columns: Columns) -> str:
    """What a reader knows the row by."""
    roles = (columns.text or columns.prompt or columns.messages or columns.chosen or columns.tokens, columns.pair)
    return " | ".join(_in_cell(row.get(name)) for name in roles if name is not None)


def _in_cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list | tuple) and all(isinstance(v, str) for v in value):
        return " ".join(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def problems_csv(found: Sequence[Problem]) -> bytes:
    """The file: place, kind, text, about."""
    sheet = io.StringIO(newline="")
    writer = csv.writer(sheet)
    writer.writerow(["place", "kind", "text", "about"])
    writer.writerows((p.place, p.kind, p.text, p.about) for p in found[:MOST])
    if len(found) > MOST:
        writer.writerow(["", "", "", f"and {len(found) - MOST} more"])
    return sheet.getvalue().encode()


def problems_said(found: Sequence[Problem]) -> str:
    """How many rows of each kind, in words."""
    counts = Counter(p.kind for p in found)
    return "rows to look at: " + ", ".join(f"{counts[kind]} {words}" for kind, words in KINDS.items() if counts[kind])

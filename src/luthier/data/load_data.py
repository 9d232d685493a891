"""From a `DataSpec` to two halves whose columns, task and duplicates are known. Nothing is tokenised here."""

import dataclasses
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, DataError, near, random
from luthier.data import (
    columns,
    decision_cache,
    label_cells,
    label_tasks,
    near_copies,
    problems,
    rows,
    tag_tasks,
    tasks,
)
from luthier.data import infer_task as inferring
from luthier.data.columns import Columns, find_columns, is_blank, label_name, text_complaint
from luthier.data.decision_cache import Decisions
from luthier.data.infer_task import infer_task
from luthier.data.near_copies import skeleton
from luthier.data.problems import Problem, find_problems, text_of
from luthier.data.rows import Duplicates, Table, count_duplicates, fold_of, halves, hold_out, load_rows
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec
from luthier.trust import row_files

__all__ = ["Data", "load_data", "load_inputs", "texts_as_rows"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a run, and what was decided about them."""

    train: Table
    test: Table | None
    columns: Columns
    task: Task
    duplicates: Duplicates
    aside: tuple[tuple[str, str], ...] = ()
    """place and reason of each row that cannot be used; they stand in neither half"""
    problems: tuple[Problem, ...] = field(default=(), repr=False)
    """rows that somebody should look at"""
    notes: tuple[str, ...] = field(default=())
    """every decision, in sentences, for the log"""

    def fingerprint(self) -> dict[str, str]:
        """SHA-256 of the rows of each half: a resumed run must find the same."""
        halves = {"train": self.train, "test": self.test}
        return {name: table.fingerprint() for name, table in halves.items() if table is not None}


def load_data(spec: DataSpec, task: str = "auto", model_config: Any = None) -> Data:
    """Read the rows, find the columns, decide the task, hold rows out, count duplicates.

    Args:
        task: one of `luthier.runs.spec.TASKS`.
        model_config: of transformers; lets the task fit the model.

    Raises:
        DataError: rows, columns or labels that cannot be used; with `spec.strict`, rows that both halves share.
        UnknownName: no such sample or task.
        ModelError: a model without the head for the task.
    """
    train, own_test = load_rows(spec.source, delimiter=spec.delimiter, encoding=spec.encoding)
    given, unused = own_test, None
    if spec.fold is not None:
        given, unused = None, own_test
    if spec.test is not None:
        first, second = load_rows(spec.test, **spec.stored(spec.test))
        given, unused = (second if second is not None else first), own_test
    train, given = _joined_labels(train, spec.label), None if given is None else _joined_labels(given, spec.label)
    readers = (columns, rows, row_files, *row_files.FILES)
    deciders = (tasks, inferring, label_cells, label_tasks, tag_tasks, problems, near_copies, random)
    made_by = (sys.modules[__name__], *readers, *deciders)
    entry = decision_cache.entry_of([t for t in (train, given) if t is not None], spec, task, model_config, made_by)
    known, said = decision_cache.read(entry) if entry is not None else (None, "")
    if known is not None:
        found, digests = known
        train, given, aside = _without(train, given, found)
        parts = _halves(train, given, found)
        for half, (digest, is_plain) in zip([p for p in parts if p is not None], digests, strict=True):
            half.known(digest, is_plain)
    else:
        found = _decide(train, given, unused, spec, task, model_config)
        train, given, aside = _without(train, given, found)
        parts = _halves(train, given, found)
        if entry is not None:
            refused = decision_cache.write(entry, found, [half for half in parts if half is not None])
            said = "; ".join(filter(None, [said, refused]))
    if spec.strict:
        found.duplicates.refuse_leakage()
    return Data(
        train=parts[0],
        test=parts[1],
        columns=found.columns,
        task=found.task,
        duplicates=found.duplicates,
        aside=aside,
        problems=found.problems,
        notes=(*found.notes, said) if said else found.notes,
    )


def _joined_labels(table: Table, label: str | None) -> Table:
    """With --label a,b,c of three columns of 0 and 1: one more column of that name, the list of those that hold 1.

    Raises:
        DataError: one of them holds something else.
    """
    if label is None or "," not in label or label in table.columns:
        return table
    names = [name.strip() for name in label.split(",")]
    if not set(names) <= set(table.columns):
        return table  # whoever looks for the column says what there is
    rows = []
    for row, place in zip(table.rows, table.places, strict=True):
        marks = {name: label_name(row[name]) for name in names}
        wrong = next((name for name, mark in marks.items() if mark not in ("0", "1", "true", "false", "")), None)
        if wrong is not None:
            raise DataError(
                f"{place}: field {wrong!r} is {row[wrong]!r}; of several columns named with --label each must hold 0 "
                "or 1. Name one column, or correct the cell."
            )
        rows.append({**row, label: [name for name, mark in marks.items() if mark in ("1", "true")]})
    return Table(rows, table.places, table.source, table.notes, table.origin)


def _without(
    train: Table, given: Table | None, found: Decisions
) -> tuple[Table, Table | None, tuple[tuple[str, str], ...]]:
    """The tables without the rows set aside, and place and reason of those."""
    places = [
        (table.places[i], why)
        for table, unusable in zip((train, given), found.aside, strict=True)
        if table is not None
        for i, why in unusable
    ]
    test = None if given is None else _less(given, found.aside[1])
    return _less(train, found.aside[0]), test, tuple(places)


def _unusable(table: Table, columns: Columns, spec: DataSpec) -> tuple[tuple[int, str], ...]:
    """Rows of a text with a label that lack either, by number and reason: no model can learn from them.

    Raises:
        DataError: more than `spec.accept_refused` of the rows, or all of them.
    """
    if columns.shape != "labelled":
        return ()
    roles = [name for name in (columns.text, columns.pair) if name is not None]
    found: list[tuple[int, str]] = []
    for i, row in enumerate(table.rows):
        why = next((c for name in roles if (c := text_complaint(row.get(name), f"field {name!r}"))), None)
        if why is None and columns.label is not None and is_blank(row.get(columns.label)):
            why = f"no label in field {columns.label!r}"
        if why is not None:
            found.append((i, why))
    share = len(found) / max(1, len(table))
    if found and (share > spec.accept_refused or share == 1):
        shown = "; ".join(f"{table.places[i]}: {why}" for i, why in found[:10])
        more = f"; and {len(found) - 10} more" if len(found) > 10 else ""
        advice = (
            "Is it the right file, and are these the right columns?"
            if share == 1
            else "Correct them, or go on without them: --skip-bad."
        )
        raise DataError(
            f"{table.source}: {len(found)} of {len(table)} rows cannot be used ({share:.1%}, accepted are "
            f"{spec.accept_refused:.1%}): {shown}{more}. {advice}"
        )
    return tuple(found)


def _said_of(aside: Sequence[tuple[tuple[int, str], ...]], n_rows: int) -> list[str]:
    reasons = Counter(why for half in aside for _, why in half)
    if not reasons:
        return []
    shown = ", ".join(f"{why} {n}" for why, n in reasons.most_common(5))
    return [f"set aside: {sum(reasons.values())} of {n_rows} rows ({shown}); they are in no half"]


def _halves(train: Table, given: Table | None, found: Decisions) -> tuple[Table, Table | None]:
    return (train, given) if found.held is None else halves(train, found.held)


def _decide(
    train: Table, test: Table | None, unused: Table | None, spec: DataSpec, task: str, model_config: Any
) -> Decisions:
    """All decisions, by looking at each row.

    Args:
        test: rows given as such.
        unused: test rows of the source itself, where others are named.
    """
    columns = find_columns(train, spec, task)
    notes = [*train.notes, *(test.notes if test is not None else ()), columns.sentence()]
    if unused is not None:
        those = f"of {spec.test}" if spec.fold is None else f"of fold {spec.fold}"
        notes.append(f"test rows are those {those}; the {len(unused)} of {unused.source} are not used")
    n_rows = len(train) + (len(test) if test is not None else 0)
    aside = (_unusable(train, columns, spec), _unusable(test, columns, spec) if test is not None else ())
    left_out = [
        (table.places[i], why, text_of(table.rows[i], columns))
        for table, unusable in zip((train, test), aside, strict=True)
        if table is not None
        for i, why in unusable
    ]
    train = _less(train, aside[0])
    test = None if test is None else _less(test, aside[1])
    notes += _said_of(aside, n_rows)
    held, whole = None, None
    if test is None and (spec.test_share > 0 or spec.fold is not None):
        whole = infer_task(train, None, columns, task, model_config)
        by_class = whole.name == "classification" and not whole.multi_label
        n_rows, outcome = len(train), columns.outcome if by_class else None
        if (fold := spec.fold_of()) is None:
            held = hold_out(train, spec.test_share, spec.split_seed, columns.content, outcome)
        else:
            number, folds, near_copies = fold
            content = (lambda row: skeleton(columns.content(row))) if near_copies else columns.content
            held = fold_of(train, number, folds, spec.split_seed, content, outcome)
        train, test = halves(train, held)
        alike = ", of each class alike" if by_class else ""
        if by_class and outcome is not None:
            counts = Counter(outcome(row) for row in (*train.rows, *test.rows))
            single = sorted(name for name, n in counts.items() if n == 1)
            if single:
                some = ", ".join(map(repr, single[:5])) + (f" and {len(single) - 5} more" if len(single) > 5 else "")
                notes.append(f"classes of one row, which is learnt and never scored: {some}")
        as_what = "test" if spec.fold is None else f"fold {spec.fold}"
        notes.append(f"held out {len(test)} of {n_rows} rows as {as_what}{alike} (seed {spec.split_seed})")
    decided_task = infer_task(train, test, columns, task, model_config)
    # Of the whole where it was split here: that is what the user knows of the file.
    notes += (whole if whole is not None and whole.name == "classification" else decided_task).notes
    duplicates = count_duplicates(train, test, columns.content, columns.outcome, columns.whole)
    notes.append(duplicates.sentence())
    twice = bool(duplicates.in_train or duplicates.in_test or duplicates.across)
    return Decisions(
        columns=columns,
        task=decided_task,
        duplicates=duplicates,
        notes=tuple(notes),
        aside=aside,
        problems=find_problems(train, test, left_out, columns, decided_task, any_twice=twice),
        held=None if held is None else tuple(held),
    )


def _less(table: Table, aside: Sequence[tuple[int, str]]) -> Table:
    if not aside:
        return table
    reasons = dict(aside)
    return table.take(i for i in range(len(table)) if i not in reasons)


def load_inputs(
    source: str, columns: Columns, *, delimiter: str | None = None, encoding: str | None = None
) -> tuple[Table, Columns]:
    """Read rows to predict: those columns of the run that are inputs must be there, labels need not.

    Args:
        source: as for training, or "-" for JSON lines or a table of text on standard input.
        delimiter, encoding: of a table of text, where what it shows is not to be trusted.

    Returns:
        The rows, and the columns without the roles that the rows lack; `columns.label` stays where it can be scored.

    Raises:
        DataError: an input column is missing; lists the columns.
    """
    stored: dict[str, Any] = {"delimiter": delimiter, "encoding": encoding}
    first, second = _standard_input(stored) if source == "-" else load_rows(source, **stored)
    table = second if second is not None else first
    found = set(table.columns)
    answers: tuple[str, ...] = ("label", "tags", "response", "chosen", "rejected", "margin", "share")
    if columns.shape == "preferred" and columns.prompt is None:
        answers = tuple(role for role in answers if role != "chosen")  # its prompt stands there
    optional = (*answers, "context")
    lacking: dict[str, Any] = {role: None for role in optional if getattr(columns, role) not in found}
    kept = dataclasses.replace(columns, **lacking)
    lost = [name for role, name in kept.used().items() if role not in answers and name not in found]
    if lost:
        raise DataError(
            f"{table.source}: no column {', '.join(map(repr, lost))}, which the model was trained to read."
            f"{near(lost[0], table.columns)} Its columns are {', '.join(map(repr, table.columns))}. Rename one."
        )
    return table, kept


def texts_as_rows(
    texts: Sequence[str], columns: Columns, task: Task, *, places: list[str], source: str, known: Sequence[str] = (),
    option: str = "--data",
) -> Table:  # fmt: skip
    """Texts as rows with the one column that a run reads.

    Args:
        known: the tasks of the run's rows, where there are several.
        option: of the command, by which rows with several columns are given.

    Raises:
        ConfigError: the run reads more than one column.
    """
    if columns.pair is not None:
        raise ConfigError(f"this run was trained on pairs of texts: give both columns in a file with {option}.")
    if columns.row_task is not None:
        raise ConfigError(
            f"this run knows several tasks ({', '.join(known)}): give rows in a file with {option}, whose column "
            f"{columns.row_task!r} says which task each is of."
        )
    if task.name == "reward":
        raise ConfigError(f"this run scores answers to prompts: give both columns in a file with {option}.")
    read = columns.inputs()
    column = read.text or read.prompt or read.messages or read.tokens or read.chosen
    assert column is not None
    values: list[Any] = list(texts)
    if column in (columns.messages, columns.chosen):
        values = [[{"role": "user", "content": text}] for text in texts]
    if column == columns.tokens:
        values = [text.split() for text in texts]
    return Table(source=source, rows=[{column: value} for value in values], places=places)


def _standard_input(stored: dict[str, Any]) -> tuple[Table, None]:
    """The rows on standard input, which are read to their end: JSON lines where they begin like that, else CSV."""
    content = sys.stdin.buffer.read()
    ending = ".jsonl" if content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")) else ".csv"
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / f"standard-input{ending}"
        path.write_bytes(content)
        try:
            found, _ = load_rows(str(path), **stored)
        except DataError as error:
            raise DataError(str(error).replace(str(path), "standard input")) from None
    places = [place.replace(str(path), "standard input") for place in found.places]
    return Table(found.rows, places, "standard input", found.notes, found.origin), None

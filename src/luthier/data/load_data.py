"""From a `DataSpec` to two halves whose columns, task and duplicates are known. Nothing is tokenised here."""

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any

from luthier.core import DataError, near, random
from luthier.data import columns, decision_cache, rows, tasks
from luthier.data.columns import Columns, find_columns
from luthier.data.decision_cache import Decisions
from luthier.data.rows import Duplicates, Table, count_duplicates, halves, hold_out, load_rows
from luthier.data.tasks import Task, infer_task
from luthier.runs.spec import DataSpec
from luthier.trust import row_files

__all__ = ["Data", "load_data", "load_inputs"]


@dataclass(frozen=True, kw_only=True)
class Data:
    """The rows of a run, and what was decided about them."""

    train: Table
    test: Table | None
    columns: Columns
    task: Task
    duplicates: Duplicates
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
    train, own_test = load_rows(spec.source)
    given, unused = own_test, None
    if spec.test is not None:
        first, second = load_rows(spec.test)
        given, unused = (second if second is not None else first), own_test
    made_by = (sys.modules[__name__], columns, random, rows, tasks, row_files)
    entry = decision_cache.entry_of([t for t in (train, given) if t is not None], spec, task, model_config, made_by)
    known, said = decision_cache.read(entry) if entry is not None else (None, "")
    if known is not None:
        found, digests = known
        parts = _halves(train, given, found)
        for half, (digest, is_plain) in zip([p for p in parts if p is not None], digests, strict=True):
            half.known(digest, is_plain)
    else:
        found = _decide(train, given, unused, spec, task, model_config)
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
        notes=(*found.notes, said) if said else found.notes,
    )


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
    notes = [columns.sentence()]
    if unused is not None:
        notes.append(f"test rows are those of {spec.test}; the {len(unused)} of {unused.source} are not used")
    held = None
    if test is None and spec.test_share > 0:
        whole = infer_task(train, None, columns, task, model_config)
        by_class = whole.name == "classification" and not whole.multi_label
        n_rows, outcome = len(train), columns.outcome if by_class else None
        held = hold_out(train, spec.test_share, spec.split_seed, columns.content, outcome)
        train, test = halves(train, held)
        alike = ", of each class alike" if by_class else ""
        notes.append(f"held out {len(test)} of {n_rows} rows as test{alike} (seed {spec.split_seed})")
    decided_task = infer_task(train, test, columns, task, model_config)
    notes += decided_task.notes
    duplicates = count_duplicates(train, test, columns.content, columns.outcome)
    notes.append(duplicates.sentence())
    return Decisions(
        columns=columns,
        task=decided_task,
        duplicates=duplicates,
        notes=tuple(notes),
        held=None if held is None else tuple(held),
    )


def load_inputs(source: str, columns: Columns) -> tuple[Table, Columns]:
    """Read rows to predict: those columns of the run that are inputs must be there, labels need not.

    Returns:
        The rows, and the columns without the roles that the rows lack; `columns.label` stays where it can be scored.

    Raises:
        DataError: an input column is missing; lists the columns.
    """
    first, second = load_rows(source)
    table = second if second is not None else first
    found = set(table.columns)
    answers = ("label", "tags", "response")
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

"""The rows of a comparison: one held-out half, or folds of which each is held out once.

Folds are made of near copies that stay together, as they are drawn together when a difference is judged, and are the
same for all methods. Every fold has seeds of its own, so that no two runs of a method share a chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from luthier.core import ConfigError, DataError, several
from luthier.data.columns import Columns
from luthier.data.load_data import Data, load_data
from luthier.data.rows import Table
from luthier.runs.spec import MOST_FOLDS, NEAR, DataSpec, RunSpec
from luthier.workflow.load_model import find_model, load_config

__all__ = ["Part", "check_cv", "parts_of", "rows_in_no_fold"]


@dataclass(frozen=True)
class Part:
    """What the runs of one fold learn and are scored on; without folds there is one."""

    base: RunSpec
    data: Data
    fold: int = 0
    """from 1; 0 where there are none"""
    of: int = 1

    @property
    def held(self) -> Table:
        """The rows that methods are compared on."""
        assert self.data.test is not None
        return self.data.test

    @property
    def columns(self) -> Columns:
        return self.data.columns

    def seed(self, number: int) -> int:
        """The seed of the runs that are called by this number, which each fold counts for itself."""
        return number * self.of + max(0, self.fold - 1)


def check_cv(base: RunSpec, folds: int, others: Sequence[str]) -> None:
    """Refuse what cannot be meant, before anything is read.

    Args:
        others: options that were given and choose one method for all folds.

    Raises:
        ConfigError: so many folds cannot be, or something else says which rows are held out.
    """
    if not 2 <= folds <= MOST_FOLDS:
        raise ConfigError(f"--cv {folds}: there can be 2 to {MOST_FOLDS} folds, such as 5.")
    spec = base.data
    for option, given in (
        (f"--test {spec.test}", spec.test is not None), (f"--fold {spec.fold}", spec.fold is not None),
        (f"--test-share {spec.test_share:g}", spec.test_share != DataSpec(source="").test_share),
    ):  # fmt: skip
        if given:
            raise ConfigError(
                f"--cv {folds}: holds each row of --data out once, and {option} names rows to hold out as well. Leave "
                "one of the two out; rows that nobody learns from belong to --test, without folds."
            )
    if others:
        raise ConfigError(
            f"--cv {folds}: {others[0]} chooses on the rows of one training half, and each fold has another, so "
            "each might choose otherwise. Choose first, without --cv; then compare what was chosen with it."
        )


def parts_of(base: RunSpec, cv: int | None) -> list[Part]:
    """The rows, read and decided, with one label each and some held out.

    Raises:
        ConfigError: a task whose rows have no one label, or none are held out.
        DataError: rows that cannot be used, or too few for so many folds.
    """
    config = load_config(find_model(base.model))
    folds = [replace(base, data=replace(base.data, fold=f"{i}/{cv}{NEAR}")) for i in range(1, (cv or 0) + 1)]
    made = []
    for number, spec in enumerate(folds or [base], 1):
        data = load_data(spec.data, spec.task, config)
        if data.task.name != "classification" or data.task.multi_label:
            raise ConfigError(
                f"compare: the task is {data.task.name}, and only rows with one label each are compared so far. Train "
                "the methods one by one; `luthier evaluate` scores each on the same file."
            )
        if data.test is None:
            raise ConfigError(
                "compare: no rows are held out (data.test_share is 0). Methods are compared on such rows."
            )
        made.append(Part(spec, data, number if folds else 0, len(folds) or 1))
    known = made[0].data.task.labels
    other = next((p for p in made if set(p.data.task.labels) != set(known)), None)
    if other is not None:
        lost = sorted(set(known) ^ set(other.data.task.labels))
        raise DataError(
            f"compare: fold {other.fold} of {other.of} has other labels than fold 1 ({', '.join(map(repr, lost[:5]))}):"
            " their rows are too few for so many folds. Fewer folds, or rows without them."
        )
    return made


def rows_in_no_fold(parts: Sequence[Part]) -> str:
    """What is said of rows that every fold learns, or nothing."""
    whole, scored = len(parts[0].data.train) + len(parts[0].held), sum(len(p.held) for p in parts)
    if len(parts) == 1 or scored == whole:
        return ""
    return (
        f"{several(whole - scored, 'row')} of {whole} {'is' if whole - scored == 1 else 'are'} in no fold: of a class "
        "whose rows are all near copies of one, which is learnt and never scored"
    )

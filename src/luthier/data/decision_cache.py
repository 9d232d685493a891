"""What was decided about the rows of files, kept between runs: a second run on the same files need not look again.

Columns, task, labels, split, duplicates and digests follow from the bytes of the files, the spec and the kind of model.
Finding them out takes longer than reading the rows. Files alone are looked up: what comes from the hub, a sample or
Parquet has no digest of its bytes at hand.
"""

import sys
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from luthier.core import build, plain
from luthier.data import disk_cache
from luthier.data.columns import Columns
from luthier.data.problems import Problem
from luthier.data.rows import Duplicates, Table
from luthier.data.tasks import Task
from luthier.runs.spec import DataSpec

__all__ = ["CACHED_FROM", "Decisions", "entry_of", "read", "write"]

CACHED_FROM = 4096
"""Fewer rows are looked at in a few hundredths of a second."""


@dataclass(frozen=True, kw_only=True)
class Decisions:
    """All that `luthier.data.load_data` decides about rows."""

    columns: Columns
    task: Task
    duplicates: Duplicates
    notes: tuple[str, ...]
    aside: tuple[tuple[tuple[int, str], ...], ...]
    """of each half as it was read: number and reason of the rows that cannot be used"""
    problems: tuple[Problem, ...]
    held: tuple[int, ...] | None
    """numbers of the rows held out as test; None where test rows were given, or none are wanted"""


def entry_of(
    tables: Sequence[Table], spec: DataSpec, task: str, model_config: Any, made_by: Sequence[ModuleType]
) -> Path | None:
    """The folder of what is, or will be, decided; None where it is to be found out each time.

    Args:
        tables: as they were read, before any split.
        made_by: the files whose source decides.
    """
    if sum(map(len, tables)) < CACHED_FROM or not all(table.origin for table in tables) or not disk_cache.limit():
        return None
    return disk_cache.entry(
        {
            "decided": [[table.source, table.origin, len(table)] for table in tables],  # notes name the sources
            "spec": plain(spec),
            "task": task,
            "model": repr(model_config),
            "made_by": disk_cache.source_digest((sys.modules[__name__], *made_by)),
            "versions": [sys.version, unicodedata.unidata_version, version("transformers")],
        }
    )


def read(entry: Path) -> tuple[tuple[Decisions, list[tuple[str, bool]]] | None, str]:
    """What was decided, with fingerprint and plainness of each half, or None where it has to be found out; and what is
    to be said about it.
    """
    found, said = disk_cache.read(entry, "decisions about the rows")
    if found is None:
        return None, said
    arrays, words = found
    decided = Decisions(
        columns=build(Columns, words["columns"], str(entry)),
        task=build(Task, words["task"], str(entry)),
        duplicates=build(Duplicates, words["duplicates"], str(entry)),
        notes=tuple(words["notes"]),
        aside=tuple(tuple((int(i), str(why)) for i, why in half) for half in words["aside"]),
        problems=tuple(Problem(*map(str, row)) for row in words["problems"]),
        held=tuple(arrays["held"].tolist()) if "held" in arrays else None,
    )
    return (decided, [(str(digest), bool(is_plain)) for digest, is_plain in words["halves"]]), ""


def write(entry: Path, decided: Decisions, halves: Sequence[Table]) -> str:
    """Keep what was decided, with the digests of the halves; returns what is to be said where that cannot be."""
    words = {name: plain(getattr(decided, name)) for name in ("columns", "task", "duplicates", "notes")}
    words["aside"] = [[list(row) for row in half] for half in decided.aside]
    words["problems"] = [[p.place, p.kind, p.text, p.about] for p in decided.problems]
    words["halves"] = [[table.fingerprint(), table.is_plain()] for table in halves]
    held = {} if decided.held is None else {"held": np.asarray(decided.held, dtype=np.int64)}
    why_not = disk_cache.write(entry, held, words)
    return f"decisions about the rows could not be kept: {why_not}" if why_not else ""

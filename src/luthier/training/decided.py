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
from typing import Any

import numpy as np

from luthier.core import build, plain, random
from luthier.training import columns, kept, rows, tasks
from luthier.training.columns import Columns
from luthier.training.rows import Duplicates, Table
from luthier.training.spec import DataSpec
from luthier.training.tasks import Task
from luthier.trust import rows as trusted

__all__ = ["KEPT_FROM", "Decided", "entry_of", "keep", "read"]

KEPT_FROM = 4096
"""Fewer rows are looked at in a few hundredths of a second."""


@dataclass(frozen=True, kw_only=True)
class Decided:
    """All that `luthier.training.data` decides about rows."""

    columns: Columns
    task: Task
    duplicates: Duplicates
    notes: tuple[str, ...]
    held: tuple[int, ...] | None
    """numbers of the rows held out as test; None where test rows were given, or none are wanted"""


def entry_of(tables: Sequence[Table], spec: DataSpec, task: str, model_config: Any) -> Path | None:
    """The folder of what is, or will be, decided; None where it is to be found out each time.

    Args:
        tables: as they were read, before any split.
    """
    if sum(map(len, tables)) < KEPT_FROM or not all(table.origin for table in tables) or not kept.limit():
        return None
    # Imported here: it builds on this file, and what it does decides too.
    from luthier.training import data

    return kept.entry(
        {
            "decided": [[table.source, table.origin, len(table)] for table in tables],  # notes name the sources
            "spec": plain(spec),
            "task": task,
            "model": repr(model_config),
            "made_by": kept.source_digest((sys.modules[__name__], data, columns, random, rows, tasks, trusted)),
            "versions": [sys.version, unicodedata.unidata_version, version("transformers")],
        }
    )


def read(entry: Path) -> tuple[tuple[Decided, list[tuple[str, bool]]] | None, str]:
    """What was decided, with fingerprint and plainness of each half, or None where it has to be found out; and what is
    to be said about it.
    """
    found, said = kept.read(entry, "decisions about the rows")
    if found is None:
        return None, said
    arrays, words = found
    decided = Decided(
        columns=build(Columns, words["columns"], str(entry)),
        task=build(Task, words["task"], str(entry)),
        duplicates=build(Duplicates, words["duplicates"], str(entry)),
        notes=tuple(words["notes"]),
        held=tuple(arrays["held"].tolist()) if "held" in arrays else None,
    )
    return (decided, [(str(digest), bool(is_plain)) for digest, is_plain in words["halves"]]), ""


def keep(entry: Path, decided: Decided, halves: Sequence[Table]) -> str:
    """Keep what was decided, with the digests of the halves; returns what is to be said where that cannot be."""
    words = {name: plain(getattr(decided, name)) for name in ("columns", "task", "duplicates", "notes")}
    words["halves"] = [[table.fingerprint(), table.is_plain()] for table in halves]
    held = {} if decided.held is None else {"held": np.asarray(decided.held, dtype=np.int64)}
    why_not = kept.keep(entry, held, words)
    return f"decisions about the rows could not be kept: {why_not}" if why_not else ""

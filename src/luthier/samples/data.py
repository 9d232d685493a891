"""Read a fetched data set.

The columns follow from the task:

    text-classification   text, label            label is a name, not a number
    pair-classification   text, text_pair, label
    chat                  messages: [{"role": "user" or "assistant", "content"}]
    instruction           prompt, response; also answers, all that are accepted
    multiple-choice       prompt (question and lettered choices), response (the right one with its letter), question,
                          choices, answer (a place in choices, from 0)
    preference            prompt, chosen, rejected
    text                  text; also work, the name of what it was cut from
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core import DataError
from luthier.samples.catalogue import find
from luthier.samples.parsers import Row
from luthier.samples.store import Progress, fetch

__all__ = ["COLUMNS", "SampleData", "load_sample"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "text-classification": ("text", "label"),
    "pair-classification": ("text", "text_pair", "label"),
    "chat": ("messages",),
    "instruction": ("prompt", "response", "answers"),
    "multiple-choice": ("prompt", "response", "question", "choices", "answer"),
    "preference": ("prompt", "chosen", "rejected"),
    "text": ("text", "work"),
}


@dataclass(frozen=True, kw_only=True)
class SampleData:
    """Both halves of a sample and what is known of them.

    Args:
        text, pair, label: names of those columns, None where the task has none.
        label_names: in alphabetical order; empty where there is no label.
        counts: the ledger of the split, see `split.Halves`.
        conflicts: one line per input that carried several labels and was dropped.
        left_out: reason -> shipped rows that the parser left out.
    """

    name: str
    task: str
    train: list[Row]
    test: list[Row]
    columns: tuple[str, ...]
    text: str | None
    pair: str | None
    label: str | None
    label_names: tuple[str, ...]
    counts: dict[str, int]
    conflicts: tuple[str, ...]
    left_out: dict[str, int]
    licence: str
    note: str


def load_sample(name: str, cache: str | Path | None = None, progress: Progress | None = None) -> SampleData:
    """Return a data set's standard split, fetching it first if need be.

    Raises:
        UnknownName, UsageError: no such sample, or a model. Else as `fetch`.
    """
    sample = find(name, "data")
    home = fetch(sample.name, cache, progress)
    info = json.loads((home / "info.json").read_text(encoding="utf-8"))
    columns = COLUMNS[info["task"]]
    return SampleData(
        name=info["name"],
        task=info["task"],
        train=_read_rows(home / "train.jsonl"),
        test=_read_rows(home / "test.jsonl"),
        columns=columns,
        text="text" if "text" in columns else None,
        pair="text_pair" if "text_pair" in columns else None,
        label="label" if "label" in columns else None,
        label_names=tuple(info["label_names"]),
        counts=info["counts"],
        conflicts=tuple(info["conflicts"]),
        left_out=info["left_out"],
        licence=sample.licence,
        note=sample.note,
    )


def _read_rows(path: Path) -> list[Row]:
    rows: list[Any] = []
    with path.open(encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON ({error}). Delete its folder to fetch it anew.") from error
    return rows

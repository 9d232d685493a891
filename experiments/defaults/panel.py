"""The sets: rows of samples that packages ship, drawn once by a keyed order, the same on every machine."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.order import shuffled
from luthier.samples.data import load_sample
from luthier.samples.store import cache_dir

__all__ = ["PANEL", "Member", "halves", "rest"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One set of the panel: so many rows of a sample's two halves."""

    name: str
    sample: str
    train: int
    test: int

    @property
    def folder(self) -> Path:
        return cache_dir() / "panel" / f"{self.name}-{self.train}-{self.test}"


PANEL = (
    Member(name="trec6", sample="trec6", train=600, test=300),
    Member(name="trec6-small", sample="trec6", train=300, test=500),
    Member(name="sarcasm", sample="sarcasm", train=600, test=300),
    Member(name="sms-spam", sample="sms-spam", train=600, test=300),
    Member(name="movie-snippets", sample="movie-snippets", train=600, test=300),
    Member(name="reuters-r8", sample="reuters-r8", train=400, test=300),
    Member(name="newsgroups20", sample="newsgroups20", train=500, test=300),
    Member(name="privacy-policy", sample="privacy-policy", train=400, test=300),
    Member(name="boolq", sample="boolq", train=300, test=300),
)
WORDS = 48
"""Of a text, at most: longer ones would take hours on one core. Every baseline reads the same texts."""


def halves(member: Member) -> tuple[Path, Path]:
    """Files with the set's training and test rows; written where they are not there yet."""
    train, test = member.folder / "train.jsonl", member.folder / "test.jsonl"
    if not test.exists():
        sample = load_sample(member.sample)
        member.folder.mkdir(parents=True, exist_ok=True)
        for path, rows, n in ((train, sample.train, member.train), (test, sample.test, member.test)):
            chosen = shuffled(len(rows), 0, "panel", member.sample)[:n]
            _write(path, [_row(rows[i]) for i in chosen])
    return train, test


def rest(member: Member, n: int, path: Path) -> Path:
    """Write the first `n` rows of the sample's training half whose texts are none of the set's training rows."""
    rows = load_sample(member.sample).train
    order = shuffled(len(rows), 0, "panel", member.sample)
    learnt = {rows[i]["text"] for i in order[: member.train]}
    _write(path, [_row(rows[i]) for i in order[member.train :] if rows[i]["text"] not in learnt][:n])
    return path


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def _row(row: dict[str, Any]) -> dict[str, Any]:
    texts = {name: " ".join(row[name].split()[:WORDS]) for name in ("text", "text_pair") if name in row}
    return {**texts, "label": row["label"]}

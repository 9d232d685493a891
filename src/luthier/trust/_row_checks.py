"""Rows as they are handed on, what is wrong with a file gathered, and the checks that every kind of file shares."""

import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.core import DataError, Refused, near
from luthier.trust._bytes import read_capped, show
from luthier.trust._limits import Limits

__all__ = [
    "BadRow",
    "Complaints",
    "Rows",
    "check_names",
    "check_row",
    "check_values",
    "content_of",
    "finish",
    "named_columns",
    "refuse_nothing",
    "text_of",
]


@dataclass(frozen=True)
class Rows:
    """Verified rows. `places[i]` is the "file:line" of `rows[i]`; `left_out` the complaints about rows not taken.
    `digest` is the SHA-256, in hexadecimal, of the bytes that were read; empty for Parquet, which is read in pieces.
    """

    rows: list[dict[str, Any]]
    places: list[str]
    left_out: list[str] = field(default_factory=list)
    digest: str = ""
    notes: tuple[str, ...] = ()
    """what was recognised, in sentences"""

    def __len__(self) -> int:
        return len(self.rows)

    def columns(self) -> list[str]:
        """The names of the columns, in the order of the file."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def duplicates(self) -> list[tuple[str, str]]:
        """(place, place of the first) of each row that equals an earlier one."""
        first: dict[str, str] = {}
        found = []
        for row, place in zip(self.rows, self.places, strict=True):
            text = json.dumps(row, sort_keys=True, default=repr)
            if text in first:
                found.append((place, first[text]))
            else:
                first[text] = place
        return found


class Complaints:
    """What is wrong with a file, gathered until there is too much of it."""

    def __init__(self, budget: int, limits: Limits) -> None:
        self.found: list[str] = []
        self.count, self.budget, self.most = 0, budget, limits.complaints

    def add(self, place: str, reason: str) -> None:
        self.count += 1
        if len(self.found) < max(self.most, self.budget):
            self.found.append(f"{place}: {reason}")

    def settle(self, where: str) -> list[str]:
        """Raise if there are more complaints than the budget allows."""
        if self.count > self.budget:
            more = f"\nand {self.count - self.most} more" if self.count > self.most else ""
            allowed = f" ({self.budget} may be left out)" if self.budget else ""
            lines = "\n".join(self.found[: self.most])
            raise DataError(
                f"{where}: {self.count} bad rows{allowed}:\n{lines}{more}\n"
                "Mend these lines, or take them out of the file."
            )
        return self.found


class BadRow(Exception):
    """One row that cannot be used; the message says why."""


def named_columns(names: Sequence[str]) -> list[str]:
    """Names without blanks around them; a column without one is called by its number, which nobody reads by itself."""
    trimmed = [name.strip() for name in names]
    return [name or f"column {at}" for at, name in enumerate(trimmed, 1)]


def check_row(
    row: dict[str, Any],
    keys: Sequence[str],
    require: Collection[str],
    types: Mapping[str, type | tuple[type, ...]],
    ragged: bool,
) -> None:
    for name in require:
        value = row.get(name)
        if name not in row:
            raise BadRow(f"column {show(name)} is missing; it has {show(', '.join(row))}.{near(name, list(row))}")
        if value is None or (
            isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
        ):
            raise BadRow(f"column {show(name)} is empty")
    if not ragged and list(row) != keys and row.keys() != set(keys):
        missing, extra = [k for k in keys if k not in row], [k for k in row if k not in keys]
        parts = [f"lacks column {show(missing[0])}"] if missing else []
        parts += [f"has an unknown column {show(extra[0])}"] if extra else []
        raise BadRow(" and ".join(parts) + f"; the first row has {show(', '.join(keys))}")
    for name, kind in types.items():
        value = row.get(name)
        if name in row and (not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float))):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise BadRow(f"column {show(name)} must be {wanted}, got {show(str(value))} ({type(value).__name__})")


def check_values(row: dict[str, Any], any_number: bool = False) -> None:
    waiting: list[tuple[str, Any]] = list(row.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise BadRow(f"column {show(name)} holds half of a surrogate pair, which is no character") from None
            if "\x00" in value:
                raise BadRow(f"column {show(name)} holds a NUL character")
        elif isinstance(value, dict):
            waiting.extend((str(k), v) for k, v in value.items())
            waiting.extend((name, k) for k in value)
        elif isinstance(value, list):
            waiting.extend((name, v) for v in value)
        elif isinstance(value, float) and not math.isfinite(value) and not any_number:
            raise BadRow(f"column {show(name)} holds {value}, which is no number")
        elif value is not None and not isinstance(value, int | float):
            raise BadRow(f"column {show(name)} holds a {type(value).__name__}; write it as text or number")


def check_names(names: Sequence[str], place: str, require: Collection[str], limits: Limits) -> None:
    if not names or len(names) > limits.columns:
        raise DataError(
            f"{place}: {len(names)} columns; the first line must name 1 to {limits.columns}. Is the file empty?"
        )
    for at, name in enumerate(names):
        if not name.strip():
            raise DataError(f"{place}: column {at + 1} has no name. Give it one.")
        if name in names[:at]:
            raise DataError(f"{place}: two columns are called {show(name)}. Rename one of them.")
    for name in require:
        if name not in names:
            has = show(", ".join(names), 300)
            raise DataError(f"{place}: there is no column {show(name)}.{near(name, list(names))} It has {has}.")


def content_of(path: str | os.PathLike[str], limits: Limits, seen: "hashlib._Hash") -> bytes:
    """The bytes of a text file, unpacked where its name ends in .gz; those on the disk go into the digest `seen`."""
    where = show(str(path), 200)
    content = read_capped(path, limits.row_file_bytes, "a file of rows")
    seen.update(content)
    if str(path).lower().endswith(".gz"):
        content = _unpacked(content, where, limits)
    if content[:4] == b"PK\x03\x04" or content[:2] == b"\x1f\x8b":
        raise DataError(f"{where}: a packed file, not text. Unpack it first, or name it by what it is (.xlsx, .gz).")
    return content


def _unpacked(content: bytes, where: str, limits: Limits) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as packed:
            text = packed.read(limits.row_file_bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{where}: cannot be unpacked ({show(str(error), 120)}). Fetch it again.") from None
    if len(text) > limits.row_file_bytes:
        raise Refused(f"{where}: unpacks to more than {limits.row_file_bytes} bytes, which is over the cap.")
    return text


def text_of(path: str | os.PathLike[str], limits: Limits, seen: "hashlib._Hash") -> str:
    """The text of a file in UTF-8; its bytes are added to the digest `seen`."""
    where = show(str(path), 200)
    content = content_of(path, limits, seen)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{where}: byte 0 begins UTF-16. Save it as UTF-8 (`iconv -f UTF-16 -t UTF-8`).")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}: byte {error.start} (line {line}) is not UTF-8: {show(content[error.start : error.start + 8])}. "
            "Save it as UTF-8 (`iconv -f LATIN1 -t UTF-8`, if that is what it is)."
        ) from None
    refuse_nothing(text, where)
    return text


def refuse_nothing(text: str, where: str) -> None:
    if (at := text.find("\x00")) >= 0:
        raise DataError(f"{where}: line {text.count(chr(10), 0, at) + 1} holds a NUL character. Remove it.")
    if not text.strip():
        raise DataError(f"{where}: is empty. Give a file with rows.")


def finish(
    rows: list[dict[str, Any]],
    places: list[str],
    complaints: Complaints,
    where: str,
    limits: Limits,
    digest: str = "",
    notes: Sequence[str] = (),
) -> Rows:
    left_out = complaints.settle(where)
    if not rows:
        raise DataError(f"{where}: holds no rows. Give a file with at least one.")
    if len(rows) > limits.rows:
        raise Refused(f"{where}: {len(rows)} rows; at most {limits.rows} are read.")
    return Rows(rows, places, left_out, digest, tuple(filter(None, notes)))

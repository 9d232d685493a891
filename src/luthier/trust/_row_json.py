"""Rows from JSON lines, and from one list in a .json file."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from luthier.core import DataError
from luthier.trust._bytes import show
from luthier.trust._limits import Limits
from luthier.trust._row_checks import BadRow, Complaints, Rows, check_row, check_values, finish, text_of
from luthier.trust.config import too_deep

__all__ = ["read_json", "read_jsonl"]


def read_json(path: str | os.PathLike[str], *, limits: Limits = Limits(), **options: Any) -> Rows:  # noqa: B008
    """Read a .json file: one list of objects, or JSON lines under that name. Options and errors as of `read_jsonl`."""
    where = show(str(path), 200)
    seen = hashlib.sha256()
    text = text_of(path, limits, seen)
    if text.lstrip()[:1] != "[":
        return read_jsonl(path, limits=limits, **options)
    if too_deep(text, limits.depth) is not None:
        raise DataError(f"{where}: nested deeper than {limits.depth} levels.")
    reader = _LineReader(limits, any_number=bool(options.get("as_found")))
    try:
        found = reader.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. Mend it.") from None
    except BadRow as bad:
        raise DataError(f"{where}: {bad}. Mend it.") from None
    numbered = ((f"{path}[{number}]", value) for number, value in enumerate(found, 1))
    return _gather(numbered, where, seen.hexdigest(), limits, reader.row, **options)


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    require: Collection[str] = (),
    types: Mapping[str, type | tuple[type, ...]] | None = None,
    ragged: bool = False,
    skip_bad: int = 0,
    as_found: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> Rows:
    """Read JSON lines in UTF-8: one object a line, all with the same keys.

    Args:
        path: the file.
        require: keys that must be there and may not be empty in any row.
        types: key -> the type or types its value must have.
        ragged: let rows have different keys.
        skip_bad: how many bad rows may be left out.
        as_found: a key that a row lacks is a cell that holds nothing, and NaN is a number that is none.
        limits: caps.

    Raises:
        BadInput: no such file.
        DataError: not UTF-8, malformed lines, lone surrogates, NaN, other keys than the first row; all named.
        Refused: not a regular file, or over a cap.
    """
    where = show(str(path), 200)
    seen = hashlib.sha256()
    text = text_of(path, limits, seen)
    reader = _LineReader(limits, any_number=as_found)
    lines = text.split("\n")  # not splitlines(): U+2028 may stand inside a JSON text
    while lines and not lines[-1].strip():
        lines.pop()
    name = str(path)
    numbered = ((f"{name}:{number}", line) for number, line in enumerate(lines, 1))
    return _gather(
        numbered, where, seen.hexdigest(), limits, reader.parse,
        require=require, types=types, ragged=ragged, skip_bad=skip_bad, as_found=as_found,
    )  # fmt: skip


def _gather(
    found: Iterable[tuple[str, Any]],
    where: str,
    digest: str,
    limits: Limits,
    row_of: Callable[[Any], dict[str, Any]],
    *,
    require: Collection[str] = (),
    types: Mapping[str, type | tuple[type, ...]] | None = None,
    ragged: bool = False,
    skip_bad: int = 0,
    as_found: bool = False,
) -> Rows:
    """Rows out of (place, what stands there)."""
    complaints = Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    keys: list[str] | None = None
    for place, value in found:
        try:
            row = row_of(value)
            if keys is None:
                keys = list(row)
            check_row(row, keys, require, types or {}, ragged or as_found)
        except BadRow as bad:
            complaints.add(place, str(bad))
            continue
        rows.append(row)
        places.append(place)
    if as_found:
        _fill_gaps(rows)
    return finish(rows, places, complaints, where, limits, digest)


def _fill_gaps(rows: list[dict[str, Any]]) -> None:
    """A key that a row lacks holds nothing there, so that every row has every column."""
    names = dict.fromkeys(name for row in rows for name in row)
    for at, row in enumerate(rows):
        if len(row) < len(names):
            rows[at] = {name: row.get(name) for name in names}


class _LineReader:
    """Strict JSON for single lines, with the hooks made once."""

    def __init__(self, limits: Limits, any_number: bool = False) -> None:
        self.limits, self._any_number = limits, any_number

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(found)
            if len(made) != len(found):
                names = [name for name, _ in found]
                twice = next(name for name in names if names.count(name) > 1)
                raise BadRow(f"the key {show(twice)} stands twice")
            return made

        def whole(digits: str) -> int:
            if len(digits) > limits.digits:
                raise BadRow(f"a whole number of {len(digits)} digits")
            return int(digits)

        def real(digits: str) -> float:
            number = float(digits)
            if not math.isfinite(number):
                raise BadRow(f"the number {show(digits)} is beyond what a float can hold")
            return number

        def constant(word: str) -> float:
            if any_number:
                return float(word.replace("Infinity", "inf"))
            raise BadRow(f"{word} is no number in JSON")

        self._decoder = json.JSONDecoder(
            object_pairs_hook=pairs, parse_int=whole, parse_float=real, parse_constant=constant
        )

    def parse(self, line: str) -> dict[str, Any]:
        if not line.strip():
            raise BadRow("an empty line; remove it")
        if len(line) > self.limits.row_chars:
            raise BadRow(f"{len(line)} characters in one row; at most {self.limits.row_chars} are read")
        if line.count("[") + line.count("{") > self.limits.depth and too_deep(line, self.limits.depth) is not None:
            raise BadRow(f"nested deeper than {self.limits.depth} levels")
        try:
            # decode() looks for white space on both sides, which takes as long as the rest of a short row.
            row, end = self._decoder.raw_decode(line) if line[0] == "{" else (None, -1)
            if end != len(line):
                row = self._decoder.decode(line)
        except json.JSONDecodeError as error:
            raise BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise BadRow(f"must be an object like {{...}}, got {type(row).__name__}")
        if "\\u" in line and re.search(r"\\u[dD][89a-fA-F]", line):
            check_values(row, self._any_number)
        return row

    def decode(self, text: str) -> Any:
        """The value of a whole text, by the same rules."""
        return self._decoder.decode(text)

    def row(self, value: Any) -> dict[str, Any]:
        """An element of a list as a row."""
        if not isinstance(value, dict):
            raise BadRow(f"must be an object like {{...}}, got {type(value).__name__}")
        check_values(value, self._any_number)
        return value

"""Rows that are dear to make, such as answers that a model writes: made once, some at a time, and kept.

FOLDER/rows-NAME/0000.jsonl   what was made of the first rows, while there are more to make
FOLDER/rows-NAME.jsonl        all of them
FOLDER/rows-NAME.json         what they were made of: the key, the rows that were asked about, the file's digest

Who is stopped goes on after the last piece. A file is taken for what it was made of alone: another key or other rows
are refused, and so is a file that was changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from luthier.core import IntegrityError, plain
from luthier.data.rows import Table
from luthier.runs import durable

__all__ = ["PIECE", "keep_rows"]

PIECE = 64
"""Rows that are asked about at a time. Always the same ones together, so that a stop changes no batch."""


def keep_rows(
    path: Path, key: Mapping[str, Any], table: Table, make: Callable[[Table], Iterable[Mapping[str, Any]]],
    say: Callable[[str], None] = lambda line: None,
) -> Table:  # fmt: skip
    """What `make` gives for the rows of a table, from the disk where it lies there.

    Args:
        key: all that decides what is made, besides the rows.
        make: rows of some rows; what it gives for one row must not depend on the others.

    Raises:
        IntegrityError: what lies there was made of something else, or was changed.
    """
    told = path.with_suffix(".json")
    wanted = {"key": plain(dict(key)), "asked": _digest(json.dumps(plain(table.rows), sort_keys=True, default=str))}
    if told.exists():
        return _read_back(path, told, wanted)
    pieces = path.with_suffix("")
    if not pieces.exists():
        durable.make_folder(pieces)
    begun = pieces / "made-of.json"
    if not begun.exists():
        durable.write_json(begun, wanted)
    elif json.loads(begun.read_text(encoding="utf-8")) != wanted:
        raise IntegrityError(_other(path))
    texts = []
    for number, start in enumerate(range(0, len(table), PIECE)):
        piece = pieces / f"{number:04d}.jsonl"
        if not piece.exists():
            part = table.take(range(start, min(start + PIECE, len(table))))
            lines = [json.dumps(plain(dict(row)), ensure_ascii=False) + "\n" for row in make(part)]
            durable.write_bytes(piece, "".join(lines).encode())
            if len(table) > PIECE:
                say(f"{path.stem}: {min(start + PIECE, len(table))} of {len(table)} rows")
        texts.append(piece.read_bytes())
    digest = durable.write_bytes(path, b"".join(texts))
    durable.write_json(told, {**wanted, "sha256": digest})
    durable.remove_folder(pieces)
    return _read(path)


def _read_back(path: Path, told: Path, wanted: Mapping[str, Any]) -> Table:
    try:
        kept = json.loads(told.read_text(encoding="utf-8"))
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{told}: cannot be read with its rows ({error}). Restore it, or begin anew.") from error
    if {name: kept.get(name) for name in wanted} != wanted:
        raise IntegrityError(_other(path))
    if hashlib.sha256(content).hexdigest() != kept.get("sha256"):
        raise IntegrityError(f"{path}: was changed since it was made. Restore it, or begin anew in another folder.")
    leftover = path.with_suffix("")
    if leftover.exists():  # killed between the last file and this folder's end
        durable.remove_folder(leftover)
    return _read(path)


def _other(path: Path) -> str:
    return (
        f"{path}: was made of other rows, by another model or with another question than the recipe asks for now. "
        "Restore them, or begin anew in another folder."
    )


def _read(path: Path) -> Table:
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # a text may hold other ends of lines
    return Table([json.loads(line) for line in lines], [f"{path}:{n}" for n in range(1, len(lines) + 1)], str(path))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

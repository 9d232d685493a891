"""Data rows from CSV, JSON, Parquet and folders of texts. What is wrong is named by file, line and field.

Read strictly, nothing is repaired, guessed or left out. Read as people have it (`as_found`), the dialect of a CSV file
is recognised and said, and what no column that is used needs (a key that some rows lack, a number that is none, a
column without a name) is no complaint. All complaints about a file (50 at most) come together in one error; rows are
left out only where the caller gives a budget for it, and then they are listed.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from luthier.core import BadInput, DataError, Refused, near
from luthier.trust import _row_checks, _row_json, _row_tables
from luthier.trust import dialect as dialects
from luthier.trust._bytes import open_regular, show
from luthier.trust._limits import Limits
from luthier.trust._row_checks import (
    Complaints,
    Rows,
    check_names,
    content_of,
    finish,
    named_columns,
    refuse_nothing,
    text_of,
)
from luthier.trust._row_json import read_json, read_jsonl
from luthier.trust._row_tables import read_parquet, read_xlsx

__all__ = [
    "FILES",
    "Rows",
    "read",
    "read_csv",
    "read_json",
    "read_jsonl",
    "read_parquet",
    "read_text_folder",
    "read_xlsx",
]

FILES = (_row_checks, _row_json, _row_tables, dialects)
"""The files that read rows beside this one: with another text of theirs, rows may be others."""


def read(path: str | os.PathLike[str], **options: Any) -> Rows:
    """Read rows by the kind of `path`: .csv, .tsv, .jsonl, .ndjson, .json, .parquet, .xlsx, or a folder of .txt files.

    A text file may be packed: .csv.gz and so on.

    Raises:
        BadInput: no such file (near names are offered).
        DataError: another kind of file, or rows that cannot be used.
        Refused: not a regular file, or over a cap.
    """
    path = Path(path)
    options = {name: value for name, value in options.items() if value is not None}
    if path.is_dir():
        return read_text_folder(path, **_without(options, path, "delimiter", "encoding"))
    readers: dict[str, Callable[..., Rows]] = {
        **dict.fromkeys((".csv", ".tsv"), read_csv),
        **dict.fromkeys((".jsonl", ".ndjson"), read_jsonl),
        ".json": read_json,
        ".parquet": read_parquet,
        ".xlsx": read_xlsx,
    }
    open_regular(path).close()  # a missing file is the first thing to hear of
    ending = _ending(path)
    if ending not in readers or (path.suffix.lower() == ".gz" and ending in (".parquet", ".xlsx")):
        raise DataError(
            f"{show(str(path), 200)}: rows are read from {', '.join(readers)} or a folder of .txt files, not from "
            f"{show(path.suffix)}. Unpack or convert it first."
        )
    if readers[ending] is not read_csv:
        options = _without(options, path, "delimiter", "encoding")
    return readers[ending](path, **options)


def _ending(path: Path) -> str:
    """The kind of file that the name says, in small letters, without a packer's ending."""
    name = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return name.suffix.lower()


def _without(options: dict[str, Any], path: Path, *names: str) -> dict[str, Any]:
    given = [name for name in names if name in options]
    if given:
        raise BadInput(f"{show(str(path), 200)}: --{given[0]} is for .csv and .tsv files. Leave it out.")
    return options


def read_csv(
    path: str | os.PathLike[str],
    *,
    delimiter: str | None = None,
    encoding: str | None = None,
    header: Sequence[str] | None = None,
    require: Collection[str] = (),
    skip_bad: int = 0,
    as_found: bool = False,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> Rows:
    """Read a CSV file; every value stays text.

    Args:
        path: the file.
        delimiter: one character; if not given, a tab for .tsv and a comma otherwise.
        encoding: of the file; if not given, UTF-8.
        header: the names of the columns, if the first line does not hold them.
        require: columns that must be there and may not be empty in any row.
        skip_bad: how many bad rows may be left out.
        as_found: recognise delimiter and encoding where they are not given, trim names, name columns that have none.
        limits: caps.

    Raises:
        BadInput: no such file, or no such encoding.
        DataError: not in that encoding, a NUL, a ragged row, a column named twice, no rows, an open quote.
        Refused: not a regular file, or over a cap.
    """
    where = show(str(path), 200)
    seen = hashlib.sha256()
    usual = "\t" if _ending(Path(path)) == ".tsv" else ","
    notes: list[str] = []
    if as_found or encoding is not None:
        content = content_of(path, limits, seen)
        text, said = dialects.decode(content, where, encoding)
        notes.append(said)
        refuse_nothing(text, where)
    else:
        text = text_of(path, limits, seen)
    if delimiter is not None and len(delimiter) != 1:
        delimiter = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";"}.get(delimiter, delimiter)
        if len(delimiter) != 1:
            raise BadInput(f"delimiter {delimiter!r}: give one character, or tab.")
    dialect = dialects.Dialect(delimiter or usual)
    if as_found:
        dialect, said = dialects.guess(text, usual, delimiter)
        notes.append(said)
    complaints = Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    blank: list[str] = []
    kept_limit = csv.field_size_limit(limits.row_chars)
    try:
        lines = dialects.records(text, dialect)
        names = list(header) if header is not None else next(lines, [])
        if as_found:
            names = named_columns(names)
        check_names(names, f"{where}:1", require, limits)
        last = lines.line_num
        for values in lines:
            place, last = f"{path}:{last + 1}", lines.line_num
            if not values:
                blank.append(place)
                continue
            while blank:  # blank lines at the end of a file do no harm; among the rows they are a mistake
                complaints.add(blank.pop(0), "an empty line; remove it")
            if len(values) != len(names):
                complaints.add(place, f"expected {len(names)} columns ({show(', '.join(names))}), got {len(values)}")
                continue
            row = dict(zip(names, values, strict=True))
            if bad := [n for n in require if not row[n].strip()]:
                complaints.add(place, f"column {show(bad[0])} is empty")
                continue
            rows.append(row)
            places.append(place)
    except csv.Error as error:
        raise DataError(
            f"{where}:{lines.line_num}: not CSV ({show(str(error), 120)}). Look for a quote that is never closed."
        ) from None
    finally:
        csv.field_size_limit(kept_limit)
    return finish(rows, places, complaints, where, limits, seen.hexdigest(), notes)


def read_text_folder(
    path: str | os.PathLike[str],
    *,
    skip_bad: int = 0,
    as_found: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> Rows:
    """Read a folder of .txt files: rows of `text`, and of `label` where the files lie in one folder per class.

    Raises:
        BadInput: no such folder.
        DataError: files beside folders, files that are no .txt, empty or undecodable texts.
        Refused: links and other things that are no regular files.
    """
    folder = Path(path)
    where = show(str(folder), 200)
    if not folder.is_dir():
        names = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise BadInput(f"{where}: there is no such folder.{near(folder.name, names)}")
    complaints = Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    seen = hashlib.sha256()

    def take(file: Path, label: str | None) -> None:
        if file.is_symlink() or not file.is_file():
            raise Refused(f"{show(str(file), 200)}: a link or no regular file. Put the file itself there.")
        if file.suffix != ".txt":
            complaints.add(f"{file}:1", "not a .txt file; move it out of the folder")
            return
        try:
            text = text_of(file, limits, seen)
        except DataError as error:
            complaints.add(f"{file}:1", str(error).removeprefix(f"{show(str(file), 200)}: "))
            return
        seen.update(f"\0{label or ''}/{file.name}\0".encode(errors="surrogateescape"))  # no text holds a NUL
        rows.append({"text": text} if label is None else {"text": text, "label": label})
        places.append(f"{file}:1")

    def listed(inside: Path) -> list[Path]:
        return sorted(e for e in inside.iterdir() if not (as_found and _of_a_system(e.name)))

    entries = listed(folder)
    classes = [e for e in entries if e.is_dir() and not e.is_symlink()]
    for entry in entries:
        if entry not in classes:
            if classes:
                complaints.add(f"{entry}:1", "lies beside the folders of the classes; move it into one")
            else:
                take(entry, None)
    for entry in classes:
        for file in listed(entry):
            take(file, entry.name)
    return finish(rows, places, complaints, where, limits, seen.hexdigest())


def _of_a_system(name: str) -> bool:
    """Files that file managers leave behind, which nobody put there."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")

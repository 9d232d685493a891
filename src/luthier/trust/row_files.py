"""Data rows from CSV, JSON, Parquet and folders of texts. What is wrong is named by file, line and field.

Read strictly, nothing is repaired, guessed or left out. Read as people have it (`as_found`), the dialect of a CSV file
is recognised and said, and what no column that is used needs (a key that some rows lack, a number that is none, a
column without a name) is no complaint. All complaints about a file (50 at most) come together in one error; rows are
left out only where the caller gives a budget for it, and then they are listed.
"""

import csv
import datetime
import decimal
import gzip
import hashlib
import io
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core import BadInput, DataError, Refused, near
from luthier.trust import dialect as dialects
from luthier.trust._bytes import open_regular, read_capped, show
from luthier.trust._limits import Limits
from luthier.trust.config import too_deep

__all__ = ["Rows", "read", "read_csv", "read_json", "read_jsonl", "read_parquet", "read_text_folder", "read_xlsx"]


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


class _Complaints:
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
        content = _content(path, limits, seen)
        text, said = dialects.decode(content, where, encoding)
        notes.append(said)
        _refuse_nothing(text, where)
    else:
        text = _text(path, limits, seen)
    if delimiter is not None and len(delimiter) != 1:
        delimiter = {"\\t": "\t", "tab": "\t", "comma": ",", "semicolon": ";"}.get(delimiter, delimiter)
        if len(delimiter) != 1:
            raise BadInput(f"delimiter {delimiter!r}: give one character, or tab.")
    dialect = dialects.Dialect(delimiter or usual)
    if as_found:
        dialect, said = dialects.guess(text, usual, delimiter)
        notes.append(said)
    complaints = _Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    blank: list[str] = []
    kept_limit = csv.field_size_limit(limits.row_chars)
    try:
        lines = dialects.records(text, dialect)
        names = list(header) if header is not None else next(lines, [])
        if as_found:
            names = _named_columns(names)
        _check_names(names, f"{where}:1", require, limits)
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
    return _finish(rows, places, complaints, where, limits, seen.hexdigest(), notes)


def _named_columns(names: Sequence[str]) -> list[str]:
    """Names without blanks around them; a column without one is called by its number, which nobody reads by itself."""
    trimmed = [name.strip() for name in names]
    return [name or f"column {at}" for at, name in enumerate(trimmed, 1)]


def read_json(path: str | os.PathLike[str], *, limits: Limits = Limits(), **options: Any) -> Rows:  # noqa: B008
    """Read a .json file: one list of objects, or JSON lines under that name. Options and errors as of `read_jsonl`."""
    where = show(str(path), 200)
    seen = hashlib.sha256()
    text = _text(path, limits, seen)
    if text.lstrip()[:1] != "[":
        return read_jsonl(path, limits=limits, **options)
    if too_deep(text, limits.depth) is not None:
        raise DataError(f"{where}: nested deeper than {limits.depth} levels.")
    reader = _LineReader(limits, any_number=bool(options.get("as_found")))
    try:
        found = reader.decode(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}:{error.lineno}: not JSON: {error.msg} at column {error.colno}. Mend it.") from None
    except _BadRow as bad:
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
    text = _text(path, limits, seen)
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
    complaints = _Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    keys: list[str] | None = None
    for place, value in found:
        try:
            row = row_of(value)
            if keys is None:
                keys = list(row)
            _check_row(row, keys, require, types or {}, ragged or as_found)
        except _BadRow as bad:
            complaints.add(place, str(bad))
            continue
        rows.append(row)
        places.append(place)
    if as_found:
        _fill_gaps(rows)
    return _finish(rows, places, complaints, where, limits, digest)


def _fill_gaps(rows: list[dict[str, Any]]) -> None:
    """A key that a row lacks holds nothing there, so that every row has every column."""
    names = dict.fromkeys(name for row in rows for name in row)
    for at, row in enumerate(rows):
        if len(row) < len(names):
            rows[at] = {name: row.get(name) for name in names}


def read_parquet(
    path: str | os.PathLike[str],
    *,
    require: Collection[str] = (),
    types: Mapping[str, type | tuple[type, ...]] | None = None,
    skip_bad: int = 0,
    as_found: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> Rows:
    """Read a Parquet file with pyarrow, after its claims have been compared with the caps. Lines count rows, from 1.

    Args:
        as_found: dates and times become text, and NaN stays a number that is none: whoever uses the column judges.

    Raises:
        BadInput: no such file.
        DataError: not Parquet, columns of a type that no row of text has, rows that cannot be used.
        Refused: not a regular file, an extension type, or over a cap.
    """
    where = show(str(path), 200)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(4)
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if size < 12 or head != b"PAR1" or tail[4:] != b"PAR1":
        raise DataError(f"{where}: no Parquet file: it must begin and end with PAR1. It is cut off: fetch it again.")
    footer = int.from_bytes(tail[:4], "little")
    if size > limits.row_file_bytes or footer > size - 12 or footer > limits.header_bytes:
        raise Refused(f"{where}: {size} bytes with a footer of {footer}; over the cap, or cut off. Fetch it again.")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"{where}: reading Parquet needs pyarrow. pip install 'luthier[parquet]', or write JSON lines."
        ) from None
    complaints = _Complaints(skip_bad, limits)
    rows: list[dict[str, Any]] = []
    places: list[str] = []
    try:
        with pq.ParquetFile(
            path,
            thrift_string_size_limit=limits.header_bytes,
            thrift_container_size_limit=1_000_000,
            page_checksum_verification=True,
        ) as table:
            facts = table.metadata
            unpacked = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
            if facts.num_rows > limits.rows or facts.num_rows < 0 or not 0 <= unpacked <= limits.row_file_bytes:
                raise Refused(f"{where}: claims {facts.num_rows} rows of {unpacked} bytes in all; over the caps.")
            schema = table.schema_arrow
            _check_names(list(schema.names), f"{where}:1", require, limits)
            for column in schema:
                if isinstance(column.type, pa.BaseExtensionType):
                    raise Refused(f"{where}: column {show(column.name)} has an extension type, which names code.")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    place = f"{path}:{len(rows) + complaints.count + 1}"
                    try:
                        _check_row(row, list(schema.names), require, types or {}, ragged=False)
                        if as_found:
                            row = {name: _plain(value) for name, value in row.items()}
                        _check_values(row, any_number=as_found)
                    except _BadRow as bad:
                        complaints.add(place, str(bad))
                        continue
                    rows.append(row)
                    places.append(place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read as Parquet ({show(str(error), 160)}). Fetch it again.") from None
    return _finish(rows, places, complaints, where, limits)


def _plain(value: Any) -> Any:
    """Dates and times as text; numbers of exact width as numbers."""
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return value.isoformat() if hasattr(value, "isoformat") else str(value)
    return float(value) if isinstance(value, decimal.Decimal) else value


def read_xlsx(
    path: str | os.PathLike[str],
    *,
    skip_bad: int = 0,
    as_found: bool = False,
    limits: Limits = Limits(),  # noqa: B008
) -> Rows:
    """Read the first sheet of a workbook: the first line names the columns. Formulas give the values last computed.

    Raises:
        BadInput: no such file.
        DataError: openpyxl is not installed, no workbook, a column named twice, no rows.
        Refused: over a cap.
    """
    where = show(str(path), 200)
    content = read_capped(path, limits.row_file_bytes, "a file of rows")
    try:
        import openpyxl
    except ImportError:
        raise DataError(
            f"{where}: reading .xlsx needs openpyxl. pip install 'luthier[excel]', or save the sheet as CSV."
        ) from None
    complaints = _Complaints(skip_bad, limits)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            if sum(entry.file_size for entry in packed.infolist()) > limits.row_file_bytes:
                raise Refused(f"{where}: unpacks to more than {limits.row_file_bytes} bytes. Save the sheet as CSV.")
        book = openpyxl.load_workbook(io.BytesIO(content), read_only=True, data_only=True)
        sheet = book.worksheets[0]
        lines = sheet.iter_rows(values_only=True)
        head = ["" if name is None else str(name) for name in next(lines, ())]
        while head and not head[-1].strip():
            head.pop()
        names = _named_columns(head)
        _check_names(names, f"{where}:1", (), limits)
        rows, places = [], []
        for number, values in enumerate(lines, 2):
            cells = [_plain(value) for value in values[: len(names)]]
            if all(cell is None for cell in cells):
                continue
            rows.append(dict(zip(names, [*cells, *[None] * (len(names) - len(cells))], strict=True)))
            places.append(f"{path}:{number}")
        others = [other.title for other in book.worksheets[1:]]
    except (zipfile.BadZipFile, KeyError, ValueError, IndexError, SyntaxError) as error:
        raise DataError(f"{where}: cannot be read as a workbook ({show(str(error), 120)}). Save it anew.") from None
    notes = [f"the first sheet, {sheet.title!r}, is read, not {', '.join(map(repr, others))}"] if others else []
    return _finish(rows, places, complaints, where, limits, hashlib.sha256(content).hexdigest(), notes)


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
    complaints = _Complaints(skip_bad, limits)
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
            text = _text(file, limits, seen)
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
    return _finish(rows, places, complaints, where, limits, seen.hexdigest())


def _of_a_system(name: str) -> bool:
    """Files that file managers leave behind, which nobody put there."""
    return name.startswith(".") or name.lower() in ("thumbs.db", "desktop.ini", "__macosx")


class _BadRow(Exception):
    """One row that cannot be used; the message says why."""


class _LineReader:
    """Strict JSON for single lines, with the hooks made once."""

    def __init__(self, limits: Limits, any_number: bool = False) -> None:
        self.limits, self._any_number = limits, any_number

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            made = dict(found)
            if len(made) != len(found):
                names = [name for name, _ in found]
                twice = next(name for name in names if names.count(name) > 1)
                raise _BadRow(f"the key {show(twice)} stands twice")
            return made

        def whole(digits: str) -> int:
            if len(digits) > limits.digits:
                raise _BadRow(f"a whole number of {len(digits)} digits")
            return int(digits)

        def real(digits: str) -> float:
            number = float(digits)
            if not math.isfinite(number):
                raise _BadRow(f"the number {show(digits)} is beyond what a float can hold")
            return number

        def constant(word: str) -> float:
            if any_number:
                return float(word.replace("Infinity", "inf"))
            raise _BadRow(f"{word} is no number in JSON")

        self._decoder = json.JSONDecoder(
            object_pairs_hook=pairs, parse_int=whole, parse_float=real, parse_constant=constant
        )

    def parse(self, line: str) -> dict[str, Any]:
        if not line.strip():
            raise _BadRow("an empty line; remove it")
        if len(line) > self.limits.row_chars:
            raise _BadRow(f"{len(line)} characters in one row; at most {self.limits.row_chars} are read")
        if line.count("[") + line.count("{") > self.limits.depth and too_deep(line, self.limits.depth) is not None:
            raise _BadRow(f"nested deeper than {self.limits.depth} levels")
        try:
            # decode() looks for white space on both sides, which takes as long as the rest of a short row.
            row, end = self._decoder.raw_decode(line) if line[0] == "{" else (None, -1)
            if end != len(line):
                row = self._decoder.decode(line)
        except json.JSONDecodeError as error:
            raise _BadRow(f"not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise _BadRow(f"must be an object like {{...}}, got {type(row).__name__}")
        if "\\u" in line and re.search(r"\\u[dD][89a-fA-F]", line):
            _check_values(row, self._any_number)
        return row

    def decode(self, text: str) -> Any:
        """The value of a whole text, by the same rules."""
        return self._decoder.decode(text)

    def row(self, value: Any) -> dict[str, Any]:
        """An element of a list as a row."""
        if not isinstance(value, dict):
            raise _BadRow(f"must be an object like {{...}}, got {type(value).__name__}")
        _check_values(value, self._any_number)
        return value


def _check_row(
    row: dict[str, Any],
    keys: Sequence[str],
    require: Collection[str],
    types: Mapping[str, type | tuple[type, ...]],
    ragged: bool,
) -> None:
    for name in require:
        value = row.get(name)
        if name not in row:
            raise _BadRow(f"column {show(name)} is missing; it has {show(', '.join(row))}.{near(name, list(row))}")
        if value is None or (
            isinstance(value, str | list | dict) and not (value.strip() if isinstance(value, str) else value)
        ):
            raise _BadRow(f"column {show(name)} is empty")
    if not ragged and list(row) != keys and row.keys() != set(keys):
        missing, extra = [k for k in keys if k not in row], [k for k in row if k not in keys]
        parts = [f"lacks column {show(missing[0])}"] if missing else []
        parts += [f"has an unknown column {show(extra[0])}"] if extra else []
        raise _BadRow(" and ".join(parts) + f"; the first row has {show(', '.join(keys))}")
    for name, kind in types.items():
        value = row.get(name)
        if name in row and (not isinstance(value, kind) or (isinstance(value, bool) and kind in (int, float))):
            wanted = kind.__name__ if isinstance(kind, type) else " or ".join(k.__name__ for k in kind)
            raise _BadRow(f"column {show(name)} must be {wanted}, got {show(str(value))} ({type(value).__name__})")


def _check_values(row: dict[str, Any], any_number: bool = False) -> None:
    waiting: list[tuple[str, Any]] = list(row.items())
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _BadRow(f"column {show(name)} holds half of a surrogate pair, which is no character") from None
            if "\x00" in value:
                raise _BadRow(f"column {show(name)} holds a NUL character")
        elif isinstance(value, dict):
            waiting.extend((str(k), v) for k, v in value.items())
            waiting.extend((name, k) for k in value)
        elif isinstance(value, list):
            waiting.extend((name, v) for v in value)
        elif isinstance(value, float) and not math.isfinite(value) and not any_number:
            raise _BadRow(f"column {show(name)} holds {value}, which is no number")
        elif value is not None and not isinstance(value, int | float):
            raise _BadRow(f"column {show(name)} holds a {type(value).__name__}; write it as text or number")


def _check_names(names: Sequence[str], place: str, require: Collection[str], limits: Limits) -> None:
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


def _content(path: str | os.PathLike[str], limits: Limits, seen: "hashlib._Hash") -> bytes:
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


def _text(path: str | os.PathLike[str], limits: Limits, seen: "hashlib._Hash") -> str:
    """The text of a file in UTF-8; its bytes are added to the digest `seen`."""
    where = show(str(path), 200)
    content = _content(path, limits, seen)
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
    _refuse_nothing(text, where)
    return text


def _refuse_nothing(text: str, where: str) -> None:
    if (at := text.find("\x00")) >= 0:
        raise DataError(f"{where}: line {text.count(chr(10), 0, at) + 1} holds a NUL character. Remove it.")
    if not text.strip():
        raise DataError(f"{where}: is empty. Give a file with rows.")


def _finish(
    rows: list[dict[str, Any]],
    places: list[str],
    complaints: _Complaints,
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

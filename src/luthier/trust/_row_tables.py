"""Rows from files that hold a table of typed cells: Parquet, and the sheets of a workbook."""

import datetime
import decimal
import hashlib
import io
import os
import zipfile
from collections.abc import Collection, Mapping
from typing import Any

from luthier.core import DataError, Refused
from luthier.trust._bytes import open_regular, read_capped, show
from luthier.trust._limits import Limits
from luthier.trust._row_checks import (
    BadRow,
    Complaints,
    Rows,
    check_names,
    check_row,
    check_values,
    finish,
    named_columns,
)

__all__ = ["read_parquet", "read_xlsx"]


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
    complaints = Complaints(skip_bad, limits)
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
            check_names(list(schema.names), f"{where}:1", require, limits)
            for column in schema:
                if isinstance(column.type, pa.BaseExtensionType):
                    raise Refused(f"{where}: column {show(column.name)} has an extension type, which names code.")
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    place = f"{path}:{len(rows) + complaints.count + 1}"
                    try:
                        check_row(row, list(schema.names), require, types or {}, ragged=False)
                        if as_found:
                            row = {name: _plain(value) for name, value in row.items()}
                        check_values(row, any_number=as_found)
                    except BadRow as bad:
                        complaints.add(place, str(bad))
                        continue
                    rows.append(row)
                    places.append(place)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{where}: cannot be read as Parquet ({show(str(error), 160)}). Fetch it again.") from None
    return finish(rows, places, complaints, where, limits)


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
    complaints = Complaints(skip_bad, limits)
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
        names = named_columns(head)
        check_names(names, f"{where}:1", (), limits)
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
    return finish(rows, places, complaints, where, limits, hashlib.sha256(content).hexdigest(), notes)

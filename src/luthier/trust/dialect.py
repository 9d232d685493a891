"""How a file of text is written: its characters, what parts its columns, and whether quotes are quotes.

Spreadsheets save what the country they run in expects: semicolons and decimal commas, a code page of Windows, UTF-16
with tabs. What is recognised is said, and every guess can be overruled by naming it.
"""

import codecs
import csv
import io
import re
from dataclasses import dataclass
from typing import Any

from luthier.core import BadInput, DataError
from luthier.trust._bytes import show

__all__ = ["Dialect", "decode", "guess", "records"]

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
LOOKED_AT = 200
"""Records that a delimiter must part alike."""

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True)
class Dialect:
    """What parts the columns of a file, and whether a quote opens a quoted field."""

    delimiter: str
    quoted: bool = True


def decode(content: bytes, where: str, encoding: str | None = None) -> tuple[str, str]:
    """The text of a file, and what is to be said of how it was read; nothing for UTF-8.

    Args:
        encoding: as the user named it; without one UTF-8, UTF-16 and UTF-32 with their marks, and the code page of
            Western Windows are recognised.

    Raises:
        BadInput: no such encoding.
        DataError: bytes that the encoding has no character for, or that no usual encoding explains.
    """
    if encoding is not None:
        return _named(content, where, encoding), ""
    if content[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):  # first: one begins as the mark of UTF-16 does
        return _named(content, where, "utf-32"), "read as UTF-32"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return _named(content, where, "utf-16"), "read as UTF-16"
    try:
        return content.decode("utf-8-sig"), ""
    except UnicodeDecodeError as error:
        at = error.start
    high = sum(byte > 127 for byte in content)
    text = content.decode("cp1252", errors="replace")
    if "\ufffd" in text or _CONTROLS.search(text) or high > 0.25 * len(content):
        line = content.count(b"\n", 0, at) + 1
        raise DataError(
            f"{where}: byte {at} (line {line}) is not UTF-8: {show(content[at : at + 8])}. Name how it is written "
            "(--encoding latin-1, --encoding shift_jis, ...), or save it as UTF-8."
        )
    return text, "read as cp1252 (Western Windows); --encoding names another"


def _named(content: bytes, where: str, encoding: str) -> str:
    try:
        # "utf-8" of a file with a mark is "utf-8-sig": the mark is no character of the first column's name.
        return content.decode("utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding)
    except LookupError:
        raise BadInput(
            f"encoding {encoding!r}: Python knows none of that name. Usual ones are utf-8, utf-16, cp1252, latin-1."
        ) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{where}: byte {error.start} (line {line}) is no character of {encoding}. Name another --encoding."
        ) from None


def guess(text: str, usual: str, named: str | None = None) -> tuple[Dialect, str]:
    """What parts the columns of `text`, and what is to be said.

    The usual delimiter of the file's ending stays where it parts the first records alike into two columns or more. Of
    the others the one that does so with the most columns is taken.

    Args:
        usual: the delimiter that the ending of the file's name promises.
        named: the one that the user named.
    """
    delimiter, said = named or usual, ""
    if named is None and not _columns(text, usual):
        width, better = max((_columns(text, other), other) for other in DELIMITERS if other != usual)
        if width:
            delimiter, said = better, f"columns are parted by {DELIMITERS[better]}"
    if delimiter == "\t" and _swallows(text):
        return Dialect("\t", quoted=False), "; ".join(filter(None, [said, "quotes are read as they stand"]))
    return Dialect(delimiter), said


def _columns(text: str, delimiter: str) -> int:
    """Columns of the first records, where all have as many and there are two or more; else 0."""
    widths: set[int] = set()
    try:
        for number, record in enumerate(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)):
            if record:
                widths.add(len(record))
            if number == LOOKED_AT or len(widths) > 1:
                break
    except csv.Error:
        return 0
    return widths.pop() if len(widths) == 1 and widths != {1} else 0


def _swallows(text: str) -> bool:
    """Whether a file of tabs has a quote that is none: read as one, it takes the lines up to the next into one field.

    That is so where every line has the columns of the first as it stands, and fewer records come out with quotes.
    """
    if '"' not in text:
        return False
    lines = [line for line in text.splitlines() if line]
    if len({line.count("\t") for line in lines}) > 1:
        return False
    try:
        return sum(1 for record in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if record) < len(lines)
    except csv.Error:
        return True


def records(text: str, dialect: Dialect) -> Any:
    """A reader of the records of `text`."""
    source = io.StringIO(text, newline="")
    if dialect.quoted:
        return csv.reader(source, delimiter=dialect.delimiter, strict=True)
    return csv.reader(source, delimiter=dialect.delimiter, quoting=csv.QUOTE_NONE)

"""One small reader per shipped file format. Each gives rows in the shape of its task, in the file's order.

A reader raises where a line does not look as it should; it never skips one in silence. What a reader leaves out on
purpose (an answer that is not there, a conversation of one speaker) it counts by reason.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.core import DataError

__all__ = ["PARSERS", "Parsed", "Row"]

Row = dict[str, Any]


@dataclass(kw_only=True)
class Parsed:
    """The rows as shipped.

    Args:
        rows: all rows, or the training half where the source has its own split.
        test: the source's own test half.
        left_out: reason -> number of shipped rows that are not in `rows`.
        group: name of a key of the rows that names their source; rows of one source stay in one half. The key is
            taken out of the rows before they are written.
    """

    rows: list[Row]
    test: list[Row] | None = None
    left_out: Counter[str] = field(default_factory=Counter)
    group: str | None = None


Members = dict[str, Path]


def trec6(members: Members) -> Parsed:
    """Lines of `COARSE:fine the question itself`."""
    rows = []
    for where, line in _lines(_only(members)):
        label, gap, text = line.partition(" ")
        coarse, colon, _ = label.partition(":")
        if not (gap and colon and coarse and text.strip()):
            raise DataError(f"{where}: expected 'COARSE:fine question', got {line[:60]!r}.")
        rows.append({"text": text.strip(), "label": coarse})
    return Parsed(rows=rows)


def _only(members: Members) -> Path:
    (path,) = members.values()
    return path


def _lines(path: Path, encoding: str = "utf-8") -> list[tuple[str, str]]:
    """Pairs of (place for messages, line without its end), empty lines left out."""
    try:
        text = path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: byte {error.start} is not {encoding}.") from error
    # Not splitlines(): it also cuts at characters such as U+2028 that stand inside texts.
    numbered = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    return [(f"{path.name}:{n}", line) for n, line in numbered if line.strip()]


PARSERS: dict[str, Callable[[Members], Parsed]] = {"trec6": trec6}

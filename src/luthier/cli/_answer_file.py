"""Answers beside the rows that were asked, in a .csv, .jsonl or .parquet file that appears whole."""

import csv
import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

from luthier.core import ConfigError, ResourceError, UsageError

__all__ = ["AnswerFile"]

ENDINGS = (".csv", ".jsonl", ".parquet")


class AnswerFile:
    """Takes rows with their answers, some at a time. Leave its `with` block, and the file is there.

    The row's own columns come first, then those of the answer: label and probability, value, tags, or answer; and a
    note that says why a row has none, or what of it was not read. A name that the rows have already gets "predicted_".

    Raises:
        UsageError: another ending.
        ConfigError: the file is there already, or its folder is not.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in ENDINGS:
            raise UsageError(f"--out {path}: answers are written to {', '.join(ENDINGS)}. Choose one of these endings.")
        if self.path.suffix.lower() == ".parquet" and find_spec("pyarrow") is None:
            raise UsageError(f"--out {path}: needs pyarrow. pip install 'luthier[parquet]', or write .csv or .jsonl.")
        if self.path.exists():
            raise ConfigError(f"{path}: is there already. Name a file that does not exist.")
        if not self.path.absolute().parent.is_dir():
            raise ConfigError(f"{path}: its folder does not exist. Make it, or name another place.")
        self._draft = self.path.with_name(f".tmp-{self.path.name}")
        self._kind = self.path.suffix.lower()
        self._columns: list[str] = []
        self._kept: list[dict[str, Any]] = []

    def __enter__(self) -> "AnswerFile":
        self._file = self._draft.open("w", encoding="utf-8", newline="")
        self._writer: Any = csv.writer(self._file)
        return self

    def start(self, columns: Sequence[str], answers: Sequence[str]) -> None:
        """Name the rows' own columns, and those of the answers."""
        self._own = list(columns)
        self._given = {name: f"predicted_{name}" if name in self._own else name for name in answers}
        if self._kind == ".csv":
            self._writer.writerow([*self._own, *self._given.values()])

    def add(self, row: dict[str, Any], answer: dict[str, Any]) -> None:
        """One row with its answer."""
        cells = {name: row.get(name) for name in self._own}
        cells |= {given: answer.get(name) for name, given in self._given.items()}
        if self._kind == ".csv":
            self._writer.writerow([_text(value) for value in cells.values()])
        elif self._kind == ".jsonl":
            self._file.write(json.dumps(cells, ensure_ascii=False, default=str) + "\n")
        else:
            self._kept.append(cells)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                if self._kind == ".parquet":
                    self._write_parquet()
                self._draft.rename(self.path)
        except OSError as failed:
            raise ResourceError(f"{self.path}: cannot be written ({failed.strerror}). Name another file.") from failed
        finally:
            self._draft.unlink(missing_ok=True)

    def _write_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        names = [*self._own, *self._given.values()]
        columns = {name: [cells[name] for cells in self._kept] for name in names}
        for name, values in columns.items():
            if len({type(v) for v in values if v is not None}) > 1:  # a column has one type there
                columns[name] = [None if v is None else _text(v) for v in values]
        pyarrow.parquet.write_table(pyarrow.table(columns), self._draft)


def _text(value: Any) -> Any:
    """A cell of a table of text: lists and objects as JSON, nothing as an empty cell."""
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | tuple | dict) else value

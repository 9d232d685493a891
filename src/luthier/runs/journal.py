"""An append-only file of JSON lines that tolerates a torn tail.

Two kinds of line stand in it, told apart by the field "at":

    facts   carry the time "at" which they happened and are on the disk before `append` returns
    rows    carry no time, so that a resumed run writes the same bytes again; they are cheap (one write, no fsync) and
            made to last together, by `flush`, before the checkpoint that counts them

A process that is killed loses nothing that was appended; a power loss loses at most the rows since the last flush,
which the resumed run writes again.
"""

import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core import ConfigError
from luthier.runs import durable

__all__ = ["Journal", "Replay"]

APPENDED_AT_ONCE = 1 << 20  # bytes


@dataclass(frozen=True)
class Replay:
    """What a journal's file holds.

    Attributes:
        lines: the whole lines, in order.
        torn_bytes: length of an unfinished last line, which is not among them.
        bad: (line number from 1, reason) of lines that cannot be read.
    """

    lines: list[dict[str, Any]]
    torn_bytes: int
    bad: list[tuple[int, str]]


class Journal:
    """The file at `path`. Reading needs nothing; appending opens it, and cuts off a torn tail first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self._unsynced = False
        self._n_rows: int | None = None
        self.cut_bytes = 0  # torn bytes that opening for appending cut off

    def open(self) -> None:
        """Open for appending.

        Raises:
            ResourceError: it cannot be opened or written.
        """
        if self._fd is not None:
            return
        new = not self.path.exists()
        if new:
            durable.write_bytes(self.path, b"")
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise durable.explain(error, self.path, "opening") from error
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self.cut_bytes = len(content) - whole
            durable.truncate(self._fd, self.path, whole)

    def close(self) -> None:
        """Flush and close."""
        if self._fd is not None:
            self.flush()
            os.close(self._fd)
            self._fd = None

    def append(self, line: dict[str, Any], *, fact: bool) -> None:
        """Append one line; a fact gets its time and lasts at once.

        Raises:
            ConfigError: a value is no plain value, or a number is not finite (write it as text).
            DiskFull, ResourceError: it cannot be written.
        """
        self.open()
        assert self._fd is not None
        if fact:
            line = {**line, "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        elif "at" in line:
            raise ConfigError(f"{self.path}: a row must not have a field 'at' (it marks facts); rename it.")
        try:
            text = json.dumps(line, ensure_ascii=False, allow_nan=False, separators=(", ", ": "))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.path}: {line!r} cannot be written as JSON ({error}); use plain values."
            ) from error
        durable.append(self._fd, self.path, text.encode() + b"\n", lasting=fact)
        self._unsynced = not fact
        if self._n_rows is not None:
            self._n_rows += not fact

    def append_rows(self, lines: Iterable[bytes]) -> None:
        """Append many rows in few writes. Each is a line of JSON as `append` would write it, with its line's end.

        Raises:
            DiskFull, ResourceError: they cannot be written.
        """
        self.open()
        assert self._fd is not None
        waiting: list[bytes] = []
        size = count = 0

        def write() -> None:
            assert self._fd is not None
            durable.append(self._fd, self.path, b"".join(waiting), lasting=False)
            self._unsynced = True

        for line in lines:
            waiting.append(line)
            size += len(line)
            count += 1
            if size >= APPENDED_AT_ONCE:
                write()
                waiting, size = [], 0
        if waiting:
            write()
        if self._n_rows is not None:
            self._n_rows += count

    def flush(self) -> None:
        """Return only once all lines are on the disk.

        Raises:
            DiskFull, ResourceError: the disk says they are not.
        """
        if self._fd is not None and self._unsynced:
            durable.sync(self._fd, self.path)
            self._unsynced = False

    def replay(self) -> Replay:
        """Read the file; nothing in it can make this fail."""
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, torn = content.rpartition(b"\n")
        lines: list[dict[str, Any]] = []
        bad: list[tuple[int, str]] = []
        for number, raw in enumerate(whole.split(b"\n") if content.count(b"\n") else [], start=1):
            line = _parse(raw)
            if isinstance(line, dict):
                lines.append(line)
            else:
                bad.append((number, line))
        return Replay(lines, len(torn), bad)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.replay().lines)

    def n_rows(self) -> int:
        """How many rows there are; counted once, then kept up."""
        if self._n_rows is None or self._fd is None:
            self._n_rows = len(self.rows())
        return self._n_rows

    def rows(self) -> list[dict[str, Any]]:
        """The lines that carry no time: what a resumed run must write again to the byte."""
        return [line for line in self.replay().lines if "at" not in line]

    def keep_rows(self, n: int) -> tuple[int, int]:
        """Rewrite the file with its first `n` rows and all facts; the rest will be written again.

        Returns:
            how many rows were dropped, and how many of the first `n` are missing.

        Raises:
            DiskFull, ResourceError: it cannot be rewritten; the old file is then untouched.
        """
        self.open()
        kept, seen = [], 0
        for raw in self.path.read_bytes().split(b"\n")[:-1]:
            line = _parse(raw)
            is_row = isinstance(line, dict) and "at" not in line
            seen += is_row
            if not is_row or seen <= n:
                kept.append(raw + b"\n")
        dropped = max(0, seen - n)
        if dropped:
            self.close()
            durable.write_bytes(self.path, b"".join(kept))
            self._n_rows = None
            self.open()
        return dropped, max(0, n - seen)


def _parse(raw: bytes) -> dict[str, Any] | str:
    """The line, or why it is none."""
    try:
        line = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        return str(error)
    return line if isinstance(line, dict) else f"not an object but {type(line).__name__}"

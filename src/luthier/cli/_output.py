"""What a user sees: facts on standard error, the result on standard output; with --json one object and nothing else."""

import contextlib
import errno
import json
import math
import os
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from typing import IO, Any, cast

from luthier.trust.text import for_terminal

__all__ = ["WIDTH", "Screen", "screen"]

WIDTH = 80


class Screen:
    """One command's output.

    Attributes:
        as_json: standard output gets exactly one JSON object.
        lively: standard error is a terminal and may be drawn on.
    """

    def __init__(self, *, as_json: bool, out: IO[str], err: IO[str]) -> None:
        self.as_json = as_json
        self.out = out
        self.err = err
        self.lively = not as_json and err.isatty()

    @classmethod
    def start(cls, *, as_json: bool) -> "Screen":
        """The screen of the command that begins now."""
        # A closed terminal fails with EIO. Facts that nobody reads any more, on a pipe either, must end no training;
        # a result that nobody reads, such as `| head`, ends its command.
        out, err = _Lasting(sys.stdout, (errno.EIO,)), _Lasting(sys.stderr, (errno.EIO, errno.EPIPE))
        made = cls(as_json=as_json, out=cast(IO[str], out), err=cast(IO[str], err))
        _now.set(made)
        return made

    def say(self, line: str) -> None:
        """One line of facts, on standard error."""
        print(for_terminal(line, keep_lines=True), file=self.err, flush=True)

    def show(self, text: str = "") -> None:
        """A piece of the result, on standard output; silent with --json."""
        if not self.as_json:
            print(for_terminal(text, keep_lines=True), file=self.out, flush=True)

    def table(self, head: Sequence[str], rows: Sequence[Sequence[Any]], *, right: Sequence[str] = ()) -> None:
        """A table of at most 80 columns, on standard output; silent with --json. `right` names columns of numbers."""
        if self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), show_header=any(head))
        for column in head:
            drawn.add_column(column, justify="right" if column in right else "left", overflow="fold")
        for row in rows:
            drawn.add_row(*(Text(for_terminal(str(cell), keep_lines=True)) for cell in row))
        console = Console(file=self.out, width=WIDTH, highlight=False)
        # Lines end where their text ends: the padding would only show up in a copy.
        with console.capture() as captured:
            console.print(drawn)
        print("\n".join(line.rstrip() for line in captured.get().splitlines()), file=self.out, flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """The command's answer for machines; silent without --json."""
        if self.as_json:
            print(json.dumps(_finite(value), allow_nan=False), file=self.out, flush=True)

    def failed(self, kind: str, message: str, code: int) -> int:
        """Say what went wrong; returns the exit code."""
        if self.as_json:
            self.result({"error": {"type": kind, "message": message, "exit_code": code}})
        else:
            self.say(f"{kind}: {message}")
        return code


class _Lasting:
    """A stream that goes on into nothing once whatever it led to is gone."""

    def __init__(self, inner: IO[str], gone: tuple[int, ...]) -> None:
        self._inner, self._gone = inner, gone

    def write(self, text: str) -> int:
        try:
            return self._inner.write(text)
        except OSError as error:
            self._lead_to_nothing(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._inner.flush()
        except OSError as error:
            self._lead_to_nothing(error)

    def _lead_to_nothing(self, error: OSError) -> None:
        if error.errno not in self._gone:
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._inner.fileno())
        os.close(nothing)
        with contextlib.suppress(OSError):
            self._inner.flush()  # what it still holds; Python would fail over it at its end

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def _finite(value: Any) -> Any:
    """JSON has no word for NaN and infinity: they become null."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


_now: ContextVar[Screen] = ContextVar("screen")


def screen() -> Screen:
    """The screen of the command that runs."""
    return _now.get()

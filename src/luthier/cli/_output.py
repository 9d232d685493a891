"""What a user sees: facts on standard error, the result on standard output; with --json one object and nothing else.

What goes to a terminal is for eyes: wrapped at its width, with a colour for headlines and errors. What goes to a pipe
or a file is for programs: one line is one line, cells of a row stand between tabs, and there is no colour.
"""

import contextlib
import errno
import json
import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import IO, TYPE_CHECKING, Any, cast

from luthier.trust.text import for_terminal

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

__all__ = ["WIDTH", "Screen", "screen"]

WIDTH = 80  # of tables where no terminal says another
NARROWEST = 40
LEAST_WRAPPED = 10  # columns that a cell which may be broken gets in any case

BOLD, RED, YELLOW = "1", "1;31", "33"

# A command must stay on one line: whoever copies it would copy the line breaks too.
COMMAND = re.compile(r"\s*(\w+: )?luthier \w")


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
        self._drawing: Console | None = None

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
        seen = _for_eyes(for_terminal(line, keep_lines=True), self.err)
        if self._drawing is not None:  # a line written past it would be torn by what moves below
            self._drawing.print(seen, markup=False, highlight=False, soft_wrap=True)
        else:
            print(seen, file=self.err, flush=True)

    def show(self, text: str = "", *, style: str = "") -> None:
        """A piece of the result, on standard output; silent with --json. `style` colours it on a terminal."""
        if not self.as_json:
            seen = _for_eyes(for_terminal(text, keep_lines=True), self.out)
            print(_coloured(seen, style, self.out), file=self.out, flush=True)

    def headline(self, text: str) -> None:
        """A line of the result that stands above others."""
        self.show(text, style=BOLD)

    def page(self, text: str) -> None:
        """Text with paragraphs that were wrapped for a file: on a terminal they are wrapped anew for its width."""
        if self.as_json:
            return
        text = for_terminal(text, keep_lines=True)
        if self.out.isatty():
            width = _width(self.out)
            lines = (line if line[:1].isspace() else _wrapped(line, width) for line in _paragraphs(text))
            text = "\n".join(lines)
        print(text, file=self.out, flush=True)

    def piece(self, text: str) -> None:
        """A part of a line of the result, shown at once; silent with --json."""
        if not self.as_json:
            print(for_terminal(text, keep_lines=True), end="", file=self.out, flush=True)

    def ask(self, words: str) -> None:
        """What stands before the place where the user types, on standard error."""
        print(for_terminal(words), end="", file=self.err, flush=True)

    def draw(self, text: "Text") -> None:
        """A piece of the result with colours of its own, on standard output; silent with --json."""
        if self.as_json:
            return
        if not self.out.isatty():
            print(text.plain, file=self.out, flush=True)
            return
        from rich.console import Console

        bare = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        Console(file=self.out, width=_width(self.out), highlight=False, no_color=bare).print(text)

    def row(self, *cells: object) -> None:
        """One of many answers, for a program: cells between tabs; silent with --json."""
        if not self.as_json:
            print("\t".join(for_terminal(str(cell)) for cell in cells), file=self.out, flush=True)

    @property
    def for_eyes(self) -> bool:
        """Whether the result goes to a terminal."""
        return not self.as_json and self.out.isatty()

    @contextlib.contextmanager
    def drawing(self) -> Iterator["Console"]:
        """A console to draw on standard error with: what is said meanwhile stands above what moves."""
        from rich.console import Console

        before, self._drawing = self._drawing, Console(file=self.err, width=_width(self.err))
        try:
            yield self._drawing
        finally:
            self._drawing = before

    @contextlib.contextmanager
    def busy(self, what: str) -> Iterator[Callable[[str], None]]:
        """Something that moves while nothing else does, with `what` beside it; the function given changes the words.

        Where standard error is no terminal, nothing is shown.
        """
        if not self.lively:
            yield lambda words: None
            return
        with self.drawing() as console, console.status(for_terminal(what), spinner="dots") as status:
            yield lambda words: status.update(for_terminal(words))

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        right: Sequence[str] = (),
        whole: Sequence[str] = (),
    ) -> None:
        """A table on standard output, as wide as the terminal where that is possible; silent with --json.

        `right` names columns of numbers; `whole` those whose cells are never broken, since they will be copied. Where
        these alone are wider than the terminal, so is the table: a number that has lost its unit is another number.
        """
        if self.as_json:
            return
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), show_header=any(head))
        for column in head:
            # A class of the user's rows may head a column: its name is text, not markup, and drives no terminal.
            name = Text(for_terminal(column, keep_lines=True))
            drawn.add_column(
                name, justify="right" if column in right else "left", overflow="fold", no_wrap=column in whole
            )
        for row in rows:
            drawn.add_row(*(Text(for_terminal(str(cell), keep_lines=True)) for cell in row))
        width = max(_width(self.out), _least_width(head, rows, whole))
        console = Console(file=self.out, width=width, highlight=False, color_system=None)
        # Lines end where their text ends: the padding would only show up in a copy.
        with console.capture() as captured:
            console.print(drawn)
        lines = [line.rstrip() for line in captured.get().splitlines()]
        if any(head):
            rule = next(n for n, line in enumerate(lines) if line.startswith("─"))
            lines[:rule] = [_coloured(line, BOLD, self.out) for line in lines[:rule]]
        print("\n".join(lines), file=self.out, flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """The command's answer for machines; silent without --json."""
        if self.as_json:
            print(json.dumps(_finite(value), allow_nan=False), file=self.out, flush=True)

    def failed(self, kind: str, message: str, code: int) -> int:
        """Say what went wrong; returns the exit code."""
        if self.as_json:
            self.result({"error": {"type": kind, "message": message, "exit_code": code}})
        else:
            label = "stopped" if kind == "Interrupted" else "error"
            seen = _for_eyes(for_terminal(f"{label}: {message}", keep_lines=True), self.err)
            print(_coloured(label, RED, self.err) + seen.removeprefix(label), file=self.err, flush=True)
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


def _width(stream: IO[str]) -> int:
    """Columns of the terminal that `stream` leads to; COLUMNS says another number, as everywhere."""
    with contextlib.suppress(ValueError):
        if (told := int(os.environ.get("COLUMNS", "0"))) > 0:
            return max(NARROWEST, told)
    if stream.isatty():
        with contextlib.suppress(OSError, ValueError):
            return max(NARROWEST, os.get_terminal_size(stream.fileno()).columns or WIDTH)
    return WIDTH


def _least_width(head: Sequence[str], rows: Sequence[Sequence[Any]], whole: Sequence[str]) -> int:
    """Columns that a table needs at least, so that no cell that stays whole is cut."""
    from rich.cells import cell_len

    found = 2 * (len(head) - 1)
    for number, name in enumerate(head):
        cells = [name, *(for_terminal(str(row[number]), keep_lines=True) for row in rows)]
        longest = max(cell_len(line) for cell in cells for line in (cell.splitlines() or [""]))
        found += longest if name in whole else min(longest, LEAST_WRAPPED)
    return found


def _coloured(text: str, style: str, stream: IO[str]) -> str:
    """`text` in a colour, where there are eyes to see it and nobody has asked for none (NO_COLOR)."""
    if not style or not text or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not stream.isatty():
        return text
    return f"\x1b[{style}m{text}\x1b[0m"


def _for_eyes(text: str, stream: IO[str]) -> str:
    """`text` wrapped at the terminal's width, further lines of a paragraph two columns in; unchanged for a pipe."""
    if not stream.isatty():
        return text
    width = _width(stream)
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width or COMMAND.match(line):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return textwrap.fill(
        line.strip(), width, initial_indent=indent, subsequent_indent=indent + "  ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _paragraphs(text: str) -> list[str]:
    """The lines of a page with each paragraph on one line; indented lines (equations) stand as they are."""
    joined: list[str] = []
    for line in text.splitlines():
        begins = not line or line[0].isspace() or re.match(r"[A-Z]\w+: ", line)
        if begins or not joined or not joined[-1] or joined[-1][0].isspace():
            joined.append(line)
        else:
            joined[-1] += " " + line
    return joined


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

"""A run that trackers are told of: what they say or do wrong stops no training."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterable, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from luthier.core import Interrupted, UnknownName, UsageError, near, plain
from luthier.runs.spec import RunSpec
from luthier.training.listener import Listener

__all__ = ["Sink", "Tracked", "check_trackers", "trackers"]

HOME = Path(__file__).parent / "trackers"


class Sink(Protocol):
    """What a tracker's file gives: it is told numbers by step, and how it ended: finished, failed or interrupted."""

    def log(self, step: int, numbers: dict[str, float]) -> None: ...

    def close(self, end: str) -> None: ...


def trackers() -> list[str]:
    """The names of all trackers: the files of their folder."""
    return sorted(module.name for module in pkgutil.iter_modules([str(HOME)]))


def check_trackers(names: Iterable[str]) -> None:
    """Refuse what cannot be told, before work starts.

    Raises:
        UnknownName: no tracker is called so.
        UsageError: its package is not installed.
    """
    for name in names:
        if name not in trackers():
            raise UnknownName(
                f"--track {name}: no tracker is called so.{near(name, trackers())} There are {', '.join(trackers())}."
            )
        package = _module(name).PACKAGE
        if find_spec(package) is None:
            raise UsageError(f"--track {name}: the package {package} is not installed. pip install {package}")


class Tracked(Listener):
    """Tells trackers what it hears, and another listener too. Leave its `with` block, and they are closed.

    A tracker that fails is named once and told nothing more; the run goes on.

    Args:
        names: of trackers.
        inner: is told everything as well.
        run: what the trackers call the run.
        spec: of the run.
    """

    def __init__(self, names: Iterable[str], inner: Listener, run: str, spec: RunSpec | Mapping[str, Any]) -> None:
        self.inner = inner
        self.run, self.facts = run, _flat(plain(spec))
        self.sinks: dict[str, Sink] = {}
        self._closed = tuple(dict.fromkeys(names))  # until training begins: what is refused before is no run of theirs

    def __enter__(self) -> Tracked:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        end = "finished" if error is None else "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            end = "interrupted"
        for name, sink in self.sinks.items():
            try:
                sink.close(end)
            except Exception as wrong:
                self.inner.say(f"{name}: did not close ({wrong})")

    def say(self, line: str) -> None:
        self.inner.say(line)

    def start(self, total: int, done: int) -> None:
        self.inner.start(total, done)
        for name in self._closed:
            try:
                self.sinks[name] = _module(name).Sink(self.run, self.facts)
            except Exception as error:
                self._lost(name, error)
        self._closed = ()

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        self.inner.step(step, row, tokens, rows)
        self._tell(step, {f"train/{name}": value for name, value in row.items() if name not in ("event", "step")})

    def scores(self, step: int, scores: dict[str, float]) -> None:
        self.inner.scores(step, scores)
        self._tell(step, {f"eval/{name}": value for name, value in scores.items()})

    def end(self) -> None:
        self.inner.end()

    def _tell(self, step: int, values: Mapping[str, Any]) -> None:
        numbers = {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        }
        for name, sink in list(self.sinks.items()):
            try:
                sink.log(step, numbers)
            except Exception as error:
                del self.sinks[name]
                self._lost(name, error)

    def _lost(self, name: str, error: Exception) -> None:
        self.inner.say(f"{name}: {error}. It is told nothing more; the run goes on.")


def _module(name: str) -> Any:
    return import_module(f"luthier.report.trackers.{name}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """One level of plain values; what is left out (None) does not appear."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif value is not None:
            found[prefix + name] = value if isinstance(value, str | int | float) else str(value)
    return found

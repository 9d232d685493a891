"""The runs of a comparison: one for each method and seed, each an ordinary run folder, found again by its spec.

A cell's folder is named by the digest of its spec, and the ledger says what came of it. So the same command finds what
is finished, resumes what was stopped, and starts what is missing; nothing that is finished is computed again.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.comparison.engines import Engine
from luthier.core import ConfigError, Interrupted, plain
from luthier.runs.ledger import Entry, Ledger, cell_id
from luthier.runs.spec import OptimSpec, RunSpec

__all__ = ["Cell", "Entrant", "Failure", "Said", "Sweep", "cells_of", "entrant_of", "finished", "stopped_softly"]

POLL = 0.1
"""Seconds between two looks for what has been settled."""


@dataclass(frozen=True)
class Entrant:
    """One way of training that is compared: a method, with settings of its own where it stands more than once."""

    name: str
    method: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run."""

    entrant: Entrant
    seed: int
    spec: RunSpec
    until: float = 1.0
    """share of the steps after which it is scored and left"""
    fold: int = 0
    """from 1, of a cross-validation; 0 where there is none"""

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.spec.out is not None
        return Path(self.spec.out)

    @property
    def id(self) -> str:
        """Its address in the ledger."""
        return cell_id(self.spec, self.until)


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result."""

    message: str
    exit_code: int


Said = Callable[[Cell, Failure | None, Mapping[str, Any]], None]
"""Is told of a cell, why it has no result or None, and the result."""


def entrant_of(words: str, read: Callable[[str], Any]) -> Entrant:
    """`lora`, or `lora:rank=4:alpha=8` for the method with these settings.

    Args:
        read: makes a value of a word.

    Raises:
        ConfigError: a part is no NAME=VALUE.
    """
    method, *parts = words.split(":")
    settings: dict[str, Any] = {}
    for part in parts:
        name, sign, value = part.partition("=")
        if not (name and sign and value):
            raise ConfigError(
                f"--method {words}: {part!r} is no setting. Write NAME=VALUE after each colon: lora:rank=4."
            )
        settings[name] = read(value)
    return Entrant(words, method, settings)


def cells_of(
    base: RunSpec, entrants: Sequence[Entrant], seeds: Iterable[int], home: Path, *,
    rates: Mapping[str, OptimSpec] | None = None, under: str = "cells", fold: int = 0,
) -> list[Cell]:  # fmt: skip
    """One cell for each seed and entrant; a seed is finished for all before the next begins.

    Args:
        rates: what moves the numbers of an entrant, where it is not what the base says.
        under: the folder in `home` that they stand in.
        fold: that the base holds out; 0 where there are no folds.
    """
    cells = []
    for seed in seeds:
        for entrant in entrants:
            spec = replace(
                base, method=entrant.method, settings={**base.settings, **entrant.settings}, seed=seed, out=None,
                optim=(rates or {}).get(entrant.name, base.optim),
            )  # fmt: skip
            name = re.sub(r"[^\w.+=-]", "_", entrant.name)[:60]
            of = f"-fold{fold}" if fold else ""
            spec = replace(spec, out=str(home / under / f"{name}{of}-seed{seed}-{spec.digest()[:10]}"))
            cells.append(Cell(entrant, seed, spec, fold=fold))
    return cells


def finished(cell: Cell) -> bool:
    """Whether its result stands."""
    return (cell.path / "record.json").is_file()


class Sweep:
    """The cells of a comparison on their way through a ledger.

    Args:
        ledger: of the comparison.
        start: makes what computes them, for so many at a time; called where something is to compute.
        workers: cells at a time.
        threads: of each process.
        say: is told what went wrong and cost time alone, once each.
    """

    def __init__(
        self, ledger: Ledger, start: Callable[[int], Engine], workers: int = 1, threads: int | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        self.ledger, self.start, self.workers, self.threads, self.say = ledger, start, workers, threads, say
        self._told: set[str] = set()
        self._engine: Engine | None = None

    def close(self) -> None:
        """Let go of every process."""
        if self._engine is not None:
            self._engine.close()

    def settle(self, cells: Sequence[Cell], said: Said) -> dict[Path, Failure]:
        """Have computed what is not finished.

        Args:
            said: called after each cell that was not, with what went wrong or None, and what came out.

        Returns:
            What failed, by folder.

        Raises:
            Interrupted: by a signal, after the cells at work have made their last step safe.
            Any LuthierError: nothing can be computed any more.
        """
        entries = [self._entry(cell, order) for order, cell in enumerate(cells)]
        open_ = {entry.id: (cell, entry) for cell, entry in zip(cells, entries, strict=True)}
        self.ledger.add(entries)
        for id, (cell, _) in list(open_.items()):
            if self._stands(cell):
                del open_[id]
            else:  # what failed is tried again by the next call; a run that was deleted is made again
                self.ledger.reopen(id)
        failures: dict[Path, Failure] = {}
        if not open_:
            return failures
        if self._engine is None:
            self._engine = self.start(self.workers)
        engine = self._engine
        engine.begin([self.ledger.entry(id) for id in open_])
        try:
            with stopped_softly():
                while open_:
                    for id in [id for id in open_ if self.ledger.settled(id)]:
                        cell, _ = open_.pop(id)
                        told = None if self.ledger.result(id) is not None else self.ledger.failure(id)
                        failure = None if told is None else Failure(str(told["message"]), int(told["exit_code"]))
                        if failure is not None:
                            failures[cell.path] = failure
                        said(cell, failure, self.ledger.result(id) or {})
                    for note in engine.check():
                        if note not in self._told:
                            self._told.add(note)
                            self.say(note)
                    time.sleep(POLL)
        except (KeyboardInterrupt, Interrupted) as stopped:
            engine.stop()
            number = stopped.exit_code - 128 if isinstance(stopped, Interrupted) else signal.SIGINT
            raise Interrupted(
                f"{len(open_)} of {len(cells)} runs are not finished; nothing is lost. The same command goes on.",
                number,
            ) from None
        finally:
            engine.begin(())
        return failures

    def placed(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells where their results lie: beside their own folders, where another process held those."""
        found = []
        for cell in cells:
            told = self.ledger.result(cell.id) or {}
            out = str(self.ledger.home / str(told["run"])) if told.get("run") else cell.spec.out
            found.append(replace(cell, spec=replace(cell.spec, out=out)))
        return found

    def standing(self, cells: Sequence[Cell]) -> int:
        """How many of the cells have a result, which is not computed again."""
        return sum(self._stands(cell) for cell in cells)

    def _stands(self, cell: Cell) -> bool:
        return self.ledger.result(cell.id) is not None and (cell.until < 1 or self._there(cell.id))

    def _there(self, id: str) -> bool:
        told = self.ledger.result(id) or {}
        return (self.ledger.home / str(told.get("run")) / "record.json").is_file()

    def _entry(self, cell: Cell, order: int) -> Entry:
        spec = plain(replace(cell.spec, out=None))
        return Entry(
            id=cell.id, spec=spec, run=str(cell.path.relative_to(self.ledger.home)), until=cell.until,
            threads=self.threads, order=order, cwd=str(Path.cwd()),
        )  # fmt: skip


@contextmanager
def stopped_softly() -> Iterator[None]:
    """A request to end (SIGTERM, SIGHUP) is one to stop where nothing is lost, in the main thread at least."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("stopped", number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)

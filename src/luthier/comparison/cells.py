"""The runs of a comparison: one for each method and seed, each an ordinary run folder, found again by its spec.

A cell's folder is named by the digest of its spec. The same command therefore finds what is finished, resumes what was
stopped, and starts what is missing; nothing that is finished is computed again.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from luthier.comparison import one_run
from luthier.core import ConfigError
from luthier.runs.forkserver import Outcome, Template
from luthier.runs.spec import OptimSpec, RunSpec

__all__ = ["Cell", "Entrant", "Failure", "cells_of", "entrant_of", "finished", "run_cells"]

RETRIES = 2
"""Of a cell whose process was killed; it is resumed."""


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

    @property
    def path(self) -> Path:
        """The run's folder."""
        assert self.spec.out is not None
        return Path(self.spec.out)


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result."""

    message: str
    exit_code: int


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
    rates: Mapping[str, OptimSpec] | None = None, under: str = "cells",
) -> list[Cell]:  # fmt: skip
    """One cell for each seed and entrant; a seed is finished for all before the next begins.

    Args:
        rates: what moves the numbers of an entrant, where it is not what the base says.
        under: the folder in `home` that they stand in.
    """
    cells = []
    for seed in seeds:
        for entrant in entrants:
            spec = replace(
                base, method=entrant.method, settings={**base.settings, **entrant.settings}, seed=seed, out=None,
                optim=(rates or {}).get(entrant.name, base.optim),
            )  # fmt: skip
            name = re.sub(r"[^\w.+=-]", "_", entrant.name)[:60]
            spec = replace(spec, out=str(home / under / f"{name}-seed{seed}-{spec.digest()[:10]}"))
            cells.append(Cell(entrant, seed, spec))
    return cells


def finished(cell: Cell) -> bool:
    """Whether its result stands."""
    return (cell.path / "record.json").is_file()


def run_cells(
    cells: Sequence[Cell], workers: int, said: Callable[[Cell, Failure | None], None], threads: int | None = None
) -> dict[Path, Failure]:
    """Run what is not finished, in processes of their own that share one loaded torch.

    Args:
        workers: processes at a time.
        said: called after each cell, with what went wrong or None.
        threads: of each process.

    Returns:
        What failed, by folder.

    Raises:
        KeyboardInterrupt: after the cells at work have made their last step safe.
    """
    failures: dict[Path, Failure] = {}
    waiting = [cell for cell in cells if not finished(cell)]
    # Every cell begins as a fork of a process that has loaded the libraries and nothing else: seconds for each cell.
    # They are started here: the kernel ends a process whose parent's thread has ended.
    free: SimpleQueue[Template] = SimpleQueue()
    with ExitStack() as templates, ThreadPoolExecutor(workers) as pool:
        for _ in range(min(workers, len(waiting))):
            free.put(templates.enter_context(Template(("torch", "luthier.workflow", "luthier.methods"))))
        open_: dict[Future[Failure | None], Cell] = {
            pool.submit(_in_process, free, cell, threads): cell for cell in waiting
        }
        try:
            while open_:
                done, _ = wait(open_, return_when=FIRST_COMPLETED)
                for future in done:
                    cell, failure = open_.pop(future), future.result()
                    if failure is not None:
                        failures[cell.path] = failure
                    said(cell, failure)
                    if failure is not None and failure.exit_code in (130, 143):
                        raise KeyboardInterrupt
        finally:  # after Ctrl-C nothing new begins; those at work make their last step safe
            pool.shutdown(wait=False, cancel_futures=True)
    return failures


def _in_process(free: SimpleQueue[Template], cell: Cell, threads: int | None) -> Failure | None:
    template = free.get()
    try:
        for _ in range(RETRIES + 1):
            words = {"spec": cell.spec.to_toml(), "threads": threads}
            outcome = template.run(one_run.__file__, "work", words, timeout_s=None)
            if outcome.status == 0:
                return None
            if outcome.status > 0:
                return _failure(outcome)
    finally:
        free.put(template)
    how = signal.Signals(-outcome.status).name
    return Failure(f"its process was ended by {how}, {RETRIES + 1} times. Less memory: a smaller --batch.", 5)


def _failure(outcome: Outcome) -> Failure:
    """What the process said last: the message of an error of ours, or the last line of a bug's."""
    lines = outcome.output.strip().splitlines() or ["it said nothing"]
    marked = [line.removeprefix(one_run.MARK) for line in lines if line.startswith(one_run.MARK)]
    if marked:
        return Failure(json.loads(marked[-1]), outcome.status)
    return Failure(f"a bug of ours: {lines[-1]}", 1)

"""Who computes the cells of a comparison: threads with a process each to fork from, or tasks of Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Protocol

from luthier.comparison.choices import one_of
from luthier.comparison.worker import Worker, template
from luthier.core import Interrupted
from luthier.runs.forkserver import Template
from luthier.runs.ledger import Entry, Ledger

__all__ = ["Engine", "Local", "check_engine", "engine_named"]


class Engine(Protocol):
    """What has cells computed."""

    def begin(self, entries: Sequence[Entry]) -> None:
        """Want these, and no others any more."""

    def check(self) -> Sequence[str]:
        """Look after those at work. Called now and then by the thread that waits for results.

        Returns:
            what there is to say: what went wrong and cost time alone.

        Raises:
            Any LuthierError: nothing can be computed any more, such as with a full disk.
        """

    def stop(self) -> None:
        """Let the cells at work make their last step safe, and begin no others; return once that is so."""

    def close(self) -> None:
        """Let go of every process."""


class Local:
    """Processes of this machine."""

    def __init__(self, ledger: Ledger, workers: int) -> None:
        self.entries: Sequence[Entry] = ()
        self.over = False
        self.error: BaseException | None = None
        # They are started here: the kernel ends a process whose parent's thread has ended.
        self.templates: list[Template] = [template() for _ in range(workers)]
        self.workers = [Worker(Ledger(ledger.home, lease=ledger.lease), made) for made in self.templates]
        self.threads = [threading.Thread(target=self._work, args=(worker,), daemon=True) for worker in self.workers]
        for thread in self.threads:
            thread.start()

    def _work(self, worker: Worker) -> None:
        try:
            worker.work(lambda: self.entries, lambda: not self.over)
        except BaseException as error:
            if not isinstance(error, Interrupted) or not self.over:
                self.error = self.error or error

    def begin(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        for worker in self.workers:
            worker.awake.set()

    def check(self) -> Sequence[str]:
        if self.error is not None:
            raise self.error
        for worker in self.workers:
            worker.watch()
        return [note for worker in self.workers for note in worker.notes]

    def stop(self) -> None:
        self.over = True
        for worker in self.workers:
            worker.stop()
        for thread in self.threads:
            thread.join()

    def close(self) -> None:
        self.over, self.entries = True, ()
        for worker in self.workers:
            worker.end()
        for thread in self.threads:
            thread.join()
        for worker in self.workers:
            worker.template.close()


def engine_named(name: str, ledger: Ledger, workers: int) -> Engine:
    """Start one.

    Raises:
        ConfigError: none is called so.
    """
    check_engine(name)
    if name == "ray":
        from luthier.comparison.ray_engine import RayEngine

        return RayEngine(ledger, workers)
    return Local(ledger, workers)


def check_engine(name: str) -> None:
    """Refuse one that is not there, before work starts.

    Raises:
        ConfigError: none is called so.
        UsageError: its package is not installed.
    """
    one_of("--engine", name, {"local": "", "ray": "ray"})

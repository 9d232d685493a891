"""Cells as tasks of Ray, on as many machines as its cluster has. A task is given two words: the ledger's folder and an
address. What the cell is, and what came of it, stands in the ledger; nothing of it is pickled, and Ray retries nothing.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.comparison.worker import Worker, template
from luthier.core import IntegrityError, Interrupted, ResourceError
from luthier.runs.ledger import MOST_ATTEMPTS, Entry, Ledger

__all__ = ["RayEngine"]

_kept: list[Any] = []
"""In a process of Ray: the one that cells are forked from, which the next task finds again."""


class RayEngine:
    """One task for each cell, so many at a time.

    RAY_ADDRESS names a cluster that is there; without it one is started on this machine, which asks for a token,
    has no dashboard, and sends nothing home. All machines see the folder of the ledger under the same name.

    Raises:
        ResourceError: Ray cannot be started or reached.
    """

    def __init__(self, ledger: Ledger, workers: int) -> None:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        there = os.environ.get("RAY_ADDRESS")
        if not there and not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this cluster, which ends with this process
        import ray

        self.ray: Any = ray
        self.ledger, self.workers = ledger, max(1, workers)
        self.entries: Sequence[Entry] = ()
        self.at_work: dict[Any, str] = {}
        self.crashes: dict[str, tuple[int, int]] = {}
        """of a cell: its newest claim, and how many processes have ended since without taking it"""
        self.there = there
        self.begun_again = 0
        """how often in a row the cluster of this process has died"""
        self._start()

    def _start(self) -> None:
        mine = {} if self.there else {"include_dashboard": False, "num_cpus": self.workers}
        try:
            self.ray.init(address=self.there, log_to_driver=False, logging_level="ERROR", **mine)
        except Exception as error:
            raise ResourceError(
                f"--engine ray: Ray cannot be started or reached ({str(error).splitlines()[0]}). RAY_ADDRESS names a "
                "cluster; RAY_AUTH_TOKEN or ~/.ray/auth_token holds its token. Without either, --engine local."
            ) from error
        self.task = self.ray.remote(num_cpus=1, max_retries=0)(_one)

    def begin(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    def check(self) -> Sequence[str]:
        notes: list[str] = []
        if self.at_work:
            ended, _ = self.ray.wait(list(self.at_work), num_returns=len(self.at_work), timeout=0)
            for task in ended:
                if task in self.at_work:  # else its cluster has died, and the others of it with it
                    notes += self._ended(task, self.at_work.pop(task))
        taken = set(self.at_work.values())
        for entry in self.entries:
            if len(self.at_work) >= self.workers:
                break
            if entry.id not in taken and self.ledger.state(entry.id) in ("waiting", "stopped"):
                self.at_work[self.task.remote(str(self.ledger.home.absolute()), entry.id, self.ledger.lease)] = entry.id
        return notes

    def _ended(self, task: Any, address: str) -> Sequence[str]:
        """What a task says at its end; nothing of one whose process was killed: its claim is proven dead, or its
        lease runs out.

        Raises:
            ResourceError: the task itself failed, in its own words: another attempt would fail for the same reason.
        """
        wrongs = self.ray.exceptions
        killed = (
            wrongs.WorkerCrashedError, wrongs.OutOfMemoryError, wrongs.TaskCancelledError, wrongs.OwnerDiedError,
            wrongs.ObjectLostError,
        )  # fmt: skip
        machines = (wrongs.LocalRayletDiedError, wrongs.NodeDiedError)
        try:
            wrong, notes = self.ray.get(task)
        except (*machines, *killed) as error:
            if isinstance(error, machines) and not self.there:
                return self._begin_again(error)
            n = self.ledger.taken(address)
            before, times = self.crashes.get(address, (n, 0))
            self.crashes[address] = (n, times + 1 if n == before else 1)
            if self.crashes[address][1] > MOST_ATTEMPTS:  # which the ledger does not count: none has taken the cell
                raise ResourceError(
                    f"--engine ray: {MOST_ATTEMPTS + 1} processes of Ray in a row ended before they had begun cell "
                    f"{address[:16]} ({type(error).__name__}: {_first_line(error)}). Ray's logs say more; "
                    "--engine local needs no Ray."
                ) from error
            return ()
        except Exception as error:
            own = getattr(error, "cause", None) or error  # what the task raised, without Ray's account of it
            raise ResourceError(
                f"--engine ray: the task of cell {address[:16]} failed: {_first_line(own)}. "
                "Every machine of the cluster needs this version of luthier and sees the folder of the comparison "
                "under the same name."
            ) from error
        if wrong:
            raise ResourceError(wrong)
        self.begun_again = 0
        return list(notes)

    def _begin_again(self, error: BaseException) -> Sequence[str]:
        """Our own cluster, of this machine alone, has died and is started anew; one that is there takes other machines.

        Raises:
            ResourceError: it has died many times in a row.
        """
        self.begun_again += 1
        if self.begun_again > MOST_ATTEMPTS:
            raise ResourceError(
                f"--engine ray: Ray has died {self.begun_again} times in a row ({_first_line(error)}). Nothing that is "
                "finished is lost; --engine local needs no Ray."
            ) from error
        self.at_work.clear()
        self.ray.shutdown()
        self._start()
        return (f"Ray has died on this machine and was started anew ({_first_line(error)})",)

    def stop(self) -> None:
        for task in self.at_work:
            self.ray.cancel(task)
        self.ray.wait(list(self.at_work), num_returns=len(self.at_work), timeout=60) if self.at_work else None

    def close(self) -> None:
        self.ray.shutdown()


def _one(home: str, address: str, lease: float) -> tuple[str, list[str]]:
    """One attempt at a cell, in a process of Ray; what is wrong with the ledger itself, or nothing, and notes."""
    ledger = Ledger(Path(home), lease=lease)
    if not _kept:
        _kept.append(template())
    worker = Worker(ledger, _kept[0])
    attempts = iter([[ledger.entry(address)]])
    try:
        worker.in_main(lambda: next(attempts, ()), lambda: False, keep=True)
    except Interrupted:
        pass
    except (IntegrityError, ResourceError) as error:
        return str(error), worker.notes
    finally:
        _kept[:] = [worker.template]
    return "", worker.notes


def _first_line(error: BaseException) -> str:
    """Ray's errors begin with what happened and go on with its logs."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)

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
from luthier.runs.ledger import Entry, Ledger

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
        mine = {} if there else {"include_dashboard": False, "num_cpus": self.workers}
        try:
            ray.init(address=there, log_to_driver=False, logging_level="ERROR", **mine)
        except Exception as error:
            raise ResourceError(
                f"--engine ray: Ray cannot be started or reached ({str(error).splitlines()[0]}). RAY_ADDRESS names a "
                "cluster; RAY_AUTH_TOKEN or ~/.ray/auth_token holds its token. Without either, --engine local."
            ) from error
        self.task = ray.remote(num_cpus=1, max_retries=0)(_one)

    def begin(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    def check(self) -> None:
        if self.at_work:
            ended, _ = self.ray.wait(list(self.at_work), num_returns=len(self.at_work), timeout=0)
            for task in ended:
                self.at_work.pop(task)
                try:
                    wrong = self.ray.get(task)
                except Exception:  # its process was killed: its claim is proven dead, or its lease runs out
                    continue
                if wrong:
                    raise ResourceError(wrong)
        taken = set(self.at_work.values())
        for entry in self.entries:
            if len(self.at_work) >= self.workers:
                break
            if entry.id not in taken and self.ledger.state(entry.id) in ("waiting", "stopped"):
                self.at_work[self.task.remote(str(self.ledger.home.absolute()), entry.id, self.ledger.lease)] = entry.id

    def stop(self) -> None:
        for task in self.at_work:
            self.ray.cancel(task)
        self.ray.wait(list(self.at_work), num_returns=len(self.at_work), timeout=60) if self.at_work else None

    def close(self) -> None:
        self.ray.shutdown()


def _one(home: str, address: str, lease: float) -> str:
    """One attempt at a cell, in a process of Ray; what is wrong with the ledger itself, or nothing."""
    ledger = Ledger(Path(home), lease=lease)
    if not _kept:
        _kept.append(template())
    worker = Worker(ledger, _kept[0])
    attempts = iter([[ledger.entry(address)]])
    try:
        worker.in_main(lambda: next(attempts, ()), lambda: False, keep=True)
    except Interrupted:
        return ""
    except (IntegrityError, ResourceError) as error:
        return str(error)
    finally:
        _kept[:] = [worker.template]
    return ""

"""The ledger of a sweep: which cells there are, who works at which, and what came of each. A folder, and no server.

    ledger/ledger.json         format and version
    ledger/specs/ID.json       one cell: everything its result depends on, whose digest is ID
    ledger/claims/ID.N         the N-th attempt at it: who, since when (myself of `runs.lock`), and how it ended
    ledger/results/ID.json     what came out; written once, and never again
    ledger/failures/ID.json    why it has no result
    ledger/discarded/ID.N.json an answer that came too late

A claim is a lease. Whoever holds it touches its file now and then. Another may take the cell with a claim of the next
number once the holder is proven dead, has let go, or has not touched the file for the length of the lease, which each
measures by its own clock from what it sees: clocks of two machines need not agree, and one that jumps does no harm.
A result is committed under the newest claim alone, and by a name that can be taken once; so a cell may be computed
twice, and counts once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, IntegrityError, LuthierError, ResourceError
from luthier.runs import durable
from luthier.runs.lock import holder_is_dead, myself
from luthier.runs.spec import RunSpec
from luthier.runs.versions import Migration, migrate

__all__ = ["LEASE", "MOST_ATTEMPTS", "Claim", "Entry", "Ledger", "cell_id"]

FOLDER = "ledger"
LEDGER_VERSION = 1
LEDGER_MIGRATIONS: dict[int, Migration] = {}
LEASE = 60.0
"""Seconds without a sign of life after which others may take a cell."""
MOST_ATTEMPTS = 6
"""Of a cell whose process is ended each time without having got any further."""
PARTS = ("specs", "claims", "results", "failures", "discarded")
ID = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One cell as the ledger holds it.

    Attributes:
        spec: plain values of a RunSpec, without its folder.
        run: the run's folder, below that of the ledger.
        until: share of the steps after which the run is scored and left; 1 for a whole run.
        threads: of the process that computes it: other numbers of threads may give other last bits.
        order: cells of low numbers are begun first.
        cwd: where relative names in the spec are meant.
    """

    id: str
    spec: dict[str, Any]
    run: str
    until: float = 1.0
    threads: int | None = None
    order: int = 0
    cwd: str = ""


@dataclass(frozen=True)
class Claim:
    """One attempt at a cell, which its process may make as long as the claim is the newest."""

    id: str
    n: int
    path: Path

    def beat(self) -> None:
        """Show that the holder lives. A disk that takes no sign lets the lease run out, and nothing else."""
        with contextlib.suppress(OSError):
            os.utime(self.path)


def cell_id(spec: RunSpec, until: float = 1.0) -> str:
    """The address of a cell.

    >>> from luthier.runs.spec import DataSpec
    >>> a, b = (RunSpec(model="m", data=DataSpec(source="d"), steps=9, out=out) for out in ("runs/a", "runs/b"))
    >>> cell_id(a) == cell_id(b), cell_id(a) == cell_id(a, until=0.5)
    (True, False)
    """
    own = spec.digest()
    return own if until == 1.0 else hashlib.sha256(f"{own} until {until!r}".encode()).hexdigest()


class Ledger:
    """The ledger in the folder of a comparison.

    Args:
        home: that folder.
        lease: seconds without a sign of life after which a claim may be taken over.

    Raises:
        ConfigError: there is none, and `make` is False.
        IntegrityError: it was written by a newer version, or cannot be read.
        DiskFull, ResourceError: it cannot be made.
    """

    def __init__(self, home: Path | str, *, make: bool = False, lease: float = LEASE) -> None:
        self.home = Path(home)
        self.path = self.home / FOLDER
        self.lease = lease
        self._seen: dict[Path, tuple[int, float]] = {}
        if make:
            self._make()
        elif not (self.path / "ledger.json").is_file():
            raise ConfigError(
                f"{home}: holds no ledger. Name the folder of a comparison: the --out of `luthier compare`, which "
                "writes one as it begins."
            )
        self._check()

    def _make(self) -> None:
        for folder in (self.path, *(self.path / part for part in PARTS)):
            if not folder.is_dir():
                try:
                    durable.make_folder(folder)
                except ResourceError:
                    if not folder.is_dir():  # else another process was faster
                        raise
        if not (self.path / "ledger.json").exists():
            durable.write_new(self.path / "ledger.json", {"format": "luthier-ledger", "version": LEDGER_VERSION})

    def _check(self) -> None:
        where = self.path / "ledger.json"
        try:
            told = json.loads(where.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise IntegrityError(
                f"{where}: cannot be read ({error}). Remove this one file, and call the same `luthier compare` again: "
                "it is made anew, and nothing that is finished is computed again."
            ) from error
        if not isinstance(told, dict) or told.get("format") != "luthier-ledger":
            raise IntegrityError(f'{where}: is not luthier\'s (its "format" is not "luthier-ledger").')
        migrate(told, LEDGER_VERSION, LEDGER_MIGRATIONS, where)

    # --- cells

    def add(self, entries: Iterable[Entry]) -> None:
        """Write down cells that are not there yet. One that is there stays as it was written.

        Raises:
            DiskFull, ResourceError: it cannot be written.
        """
        for entry in entries:
            path = self.path / "specs" / f"{entry.id}.json"
            if _entry_in(path) is None:
                values = {k: v for k, v in vars(entry).items() if k != "id"}
                durable.write_json(path, {**values, "version": LEDGER_VERSION})

    def entries(self) -> list[Entry]:
        """All cells, in the order in which they are begun. One that cannot be read is left to whoever wrote it."""
        found = [_entry_in(path) for path in (self.path / "specs").glob("*.json")]
        return sorted((e for e in found if e is not None), key=lambda e: (e.order, e.id))

    def entry(self, id: str) -> Entry:
        """One cell.

        Raises:
            ConfigError: there is none of that address.
        """
        found = _entry_in(self.path / "specs" / f"{id}.json") if ID.fullmatch(id) else None
        if found is None:
            raise ConfigError(
                f"{self.path}: no cell that can be read has the address {id[:16]}. `luthier watch` lists them."
            )
        return found

    # --- what came of them

    def result(self, id: str) -> dict[str, Any] | None:
        """What was committed, or None."""
        told = _read(self.path / "results" / f"{id}.json")
        return told if told.get("id") == id else None

    def failure(self, id: str) -> dict[str, Any] | None:
        """Why it has no result, or None."""
        return _read(self.path / "failures" / f"{id}.json") or None

    def settled(self, id: str) -> bool:
        """Whether it has a result or a failure."""
        return self.result(id) is not None or self.failure(id) is not None

    def reopen(self, id: str) -> None:
        """Let a cell be tried again: its result or failure is forgotten, and attempts are counted anew.

        Raises:
            ResourceError: the disk does not let go of it.
        """
        paths = [self.path / part / f"{id}.json" for part in ("results", "failures")]
        there = [path for path in paths if path.exists()]
        for path in there:
            durable.remove(path)
        n, told = self._last(id)
        lost = told.get("state") == "held" and self._dead(self._file(id, n), told)
        if n and (there or lost or told.get("state") == "ended"):  # who has settled it does not hold it any more
            self._end(Claim(id, n, self._file(id, n)), "released")

    # --- claims

    def claim(self, id: str, behind: int = 0) -> Claim | None:
        """Take a cell, or None: somebody works at it, it is settled, or another was faster.

        Args:
            behind: steps that its run has made safe so far.

        Raises:
            DiskFull, ResourceError: the claim cannot be written.
        """
        if self.settled(id):
            return None
        n, told = self._last(id)
        if n and told.get("state") == "held" and not self._dead(self._file(id, n), told):
            return None
        path = self._file(id, n + 1)
        content = {**myself(), "n": n + 1, "state": "held", "behind": behind}
        if not durable.write_new(path, content):
            return None
        claim = Claim(id, n + 1, path)
        if self.settled(id):  # its holder was just finishing
            self.release(claim)
            return None
        return claim

    def attempts(self, id: str) -> int:
        """Attempts in a row that ended without a result and got no further than the one before."""
        count, furthest = 0, None
        for n in range(self._last(id)[0], 0, -1):
            told = _read(self._file(id, n))
            if told.get("state") == "released" or furthest not in (None, told.get("behind")):
                break
            furthest = told.get("behind")
            count += 1
        return count

    def taken(self, id: str) -> int:
        """How often a cell has been taken: the number of its newest claim, 0 where there is none."""
        return self._last(id)[0]

    def holds(self, claim: Claim) -> bool:
        """Whether nobody has taken the cell since."""
        return self._last(claim.id)[0] == claim.n

    def commit(self, claim: Claim, result: Mapping[str, Any]) -> bool:
        """Write down what came out.

        Returns:
            whether it counts. An answer that comes too late does not: it is kept in `discarded`.

        Raises:
            DiskFull, ResourceError: it cannot be written.
            IntegrityError: a file that is no result stands in its place; the cell would be computed again and again.
        """
        content = {**result, "id": claim.id, "n": claim.n, "version": LEDGER_VERSION}
        path = self.path / "results" / f"{claim.id}.json"
        if self.holds(claim):
            if durable.write_new(path, content):
                return True
            if self.result(claim.id) is None:
                self.release(claim)
                raise IntegrityError(
                    f"{path}: is damaged, and stands where this run's result belongs. Remove this one file, and call "
                    "the same command again: what is finished is not computed again."
                )
        durable.write_json(self.path / "discarded" / f"{claim.id}.{claim.n}.json", content)
        return False

    def fail(self, claim: Claim, message: str, exit_code: int) -> None:
        """Write down why there is no result.

        Raises:
            DiskFull, ResourceError: it cannot be written.
        """
        if self.holds(claim):
            content = {"message": message, "exit_code": exit_code, "n": claim.n}
            durable.write_json(self.path / "failures" / f"{claim.id}.json", content)
            self.release(claim)

    def release(self, claim: Claim) -> None:
        """Let go of a cell: the attempt is not counted."""
        self._end(claim, "released")

    def ended(self, claim: Claim) -> None:
        """The attempt was ended from outside: others may try at once, and it is counted."""
        self._end(claim, "ended")

    def state(self, id: str) -> str:
        """done, failed, running, stopped or waiting."""
        if self.result(id) is not None:
            return "done"
        if self.failure(id) is not None:
            return "failed"
        n, told = self._last(id)
        if not n:
            return "waiting"
        return "running" if told.get("state") == "held" and not self._dead(self._file(id, n), told) else "stopped"

    def discarded(self) -> int:
        """How many answers came too late."""
        return sum(1 for _ in (self.path / "discarded").glob("*.json"))

    def _end(self, claim: Claim, state: str) -> None:
        with contextlib.suppress(LuthierError):  # a full disk: then the lease runs out
            durable.write_json(claim.path, {**_read(claim.path), "state": state})

    def _file(self, id: str, n: int) -> Path:
        return self.path / "claims" / f"{id}.{n}"

    def _last(self, id: str) -> tuple[int, dict[str, Any]]:
        numbers = [int(p.suffix[1:]) for p in (self.path / "claims").glob(f"{id}.*") if p.suffix[1:].isdecimal()]
        n = max(numbers, default=0)
        return n, _read(self._file(id, n)) if n else {}

    def _dead(self, path: Path, told: dict[str, Any]) -> bool:
        return (bool(told) and holder_is_dead(told)) or self.silent(path)

    def silent(self, path: Path) -> bool:
        """Whether nothing has touched a claim's file for the length of the lease, since this object first looked."""
        try:
            touched = path.stat().st_mtime_ns
        except OSError:
            return False
        before, since = self._seen.get(path, (None, 0.0))
        if before != touched:
            self._seen[path] = (touched, time.monotonic())
            return False
        return time.monotonic() - since > self.lease


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _entry_in(path: Path) -> Entry | None:
    told = _read(path)
    try:
        run = str(told["run"])
        if Path(run).is_absolute() or ".." in Path(run).parts or not isinstance(told["spec"], dict):
            return None  # whoever wrote that is not luthier: nothing is written outside of the folder
        threads = told.get("threads")
        return Entry(
            id=path.stem, spec=told["spec"], run=run, until=float(told["until"]),
            threads=int(threads) if threads is not None else None, order=int(told["order"]), cwd=str(told["cwd"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError):
        return None

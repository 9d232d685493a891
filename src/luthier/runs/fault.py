"""Faults that may be asked for at one numbered durable operation: die, disk full, input/output error, a slow disk.

A fault is written `scope:k:kind`, as in `LUTHIER_FAULT=save:7:kill`: at the seventh durable operation (counted from
one, over the whole process) that happens inside `scope("save")`. `*` as the scope counts every operation.

kind      what happens at operation k
kill      half of the operation is done (where it can be halved), then SIGKILL to this process
die       the same without leaving the process: `SimulatedDeath` is raised, and the disk can no longer be changed
enospc    half is done, then "no space left on device"
edquot, eio, erofs    the same with "quota exceeded", "input/output error", "read-only file system"
sleep     the operation takes `SLEEP_SECONDS` longer
drop      power loss: all bytes and names that were not yet fsynced are gone, then SIGKILL
drop-names, drop-bytes    power loss where the disk kept the bytes but not the names, or the names but not the bytes
"""

import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from luthier.core import ConfigError

__all__ = ["KINDS", "SLEEP_SECONDS", "Fault", "Operation", "PowerLoss", "SimulatedDeath", "parse_fault"]

ERRORS = {"enospc": errno.ENOSPC, "edquot": errno.EDQUOT, "eio": errno.EIO, "erofs": errno.EROFS}
KINDS = ("kill", "die", *ERRORS, "sleep", "drop", "drop-names", "drop-bytes")
SLEEP_SECONDS = 0.5


class SimulatedDeath(BaseException):
    """The process would be dead here. Not an `Exception`, so that no handler for errors takes it for one."""


@dataclass(frozen=True)
class Operation:
    """One durable operation, announced just before it happens.

    Attributes:
        kind: open, write, append, fsync, rename, fsync_dir, unlink, mkdir, rmdir or truncate.
        path: what it works on; for a rename, where from.
        target: for a rename, where to.
        half: does about half of the operation, where half of one is possible (a write).
        scopes: the names of the enclosing `scope(...)` blocks.
    """

    kind: str
    path: Path
    target: Path | None = None
    half: Callable[[], None] | None = None
    scopes: tuple[str, ...] = ()


@dataclass
class Fault:
    """Fires once, at operation `k` of `scope`.

    Attributes:
        real: for the killing kinds, True sends SIGKILL to this process; False raises `SimulatedDeath` instead, and
            goes on raising it at each later operation, so that no clean-up can change the disk.
    """

    scope: str
    k: int
    kind: str
    real: bool = True
    seen: int = 0
    fired: bool = False
    power: "PowerLoss | None" = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.k < 1:
            raise ConfigError(
                f"fault {self.scope}:{self.k}:{self.kind}: write it as scope:k:kind with k from 1 and kind one of"
                f" {', '.join(KINDS)}, for example save:7:kill."
            )
        if self.kind.startswith("drop"):
            self.power = PowerLoss(names=self.kind != "drop-bytes", data=self.kind != "drop-names")

    def before(self, operation: Operation) -> None:
        """Called by the durable layer before each operation."""
        deadly = self.kind in ("kill", "die") or self.power is not None
        if self.fired:
            if deadly:
                raise SimulatedDeath(f"dead since operation {self.k} of {self.scope}")
            return
        if self.power is not None:
            self.power.before(operation)
        if self.scope != "*" and self.scope not in operation.scopes:
            return
        self.seen += 1
        if self.seen < self.k:
            return
        self.fired = True
        if self.kind == "sleep":
            time.sleep(SLEEP_SECONDS)
            return
        if operation.half is not None:
            operation.half()
        if self.power is not None:
            self.power.strike()
        if deadly:
            if self.real and self.kind != "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise SimulatedDeath(f"died at operation {self.k} of {self.scope}: {operation.kind} {operation.path}")
        raise OSError(ERRORS[self.kind], os.strerror(ERRORS[self.kind]), str(operation.path))


def parse_fault(text: str) -> Fault:
    """Read `scope:k:kind`.

    Raises:
        ConfigError: it is not of that shape.
    """
    scope, _, rest = text.partition(":")
    number, _, kind = rest.partition(":")
    return Fault(scope, int(number) if number.isdigit() else 0, kind)


@dataclass
class _Undo:
    """How to take back one change of a name. It lasts once all of `folders` are fsynced."""

    kind: str
    path: Path
    folders: set[Path]
    target: Path | None = None
    content: bytes | None = None

    def moved(self, old: Path, new: Path) -> None:
        """A folder above has got another name, and that lasts."""
        self.path = _under(self.path, old, new)
        self.target = _under(self.target, old, new) if self.target is not None else None
        self.folders = {_under(folder, old, new) for folder in self.folders}

    def do(self) -> None:
        if not self.path.parent.is_dir():
            return  # the folder is gone for good, and this name with it
        if self.kind == "open":
            self.path.unlink(missing_ok=True)
        elif self.kind == "mkdir":
            shutil.rmtree(self.path)
        elif self.kind == "rmdir":
            self.path.mkdir()
        elif self.kind == "unlink" and self.content is not None:
            self.path.write_bytes(self.content)
        elif self.kind == "rename" and self.target is not None:
            self.target.rename(self.path)
            if self.content is not None:
                self.target.write_bytes(self.content)


def _under(path: Path, old: Path, new: Path) -> Path:
    return new / path.relative_to(old) if path.is_relative_to(old) else path


@dataclass
class PowerLoss:
    """Remembers what has not reached the disk for certain, and can take it away.

    The model is the strict reading of POSIX: the bytes of a file last once the file is fsynced; a name (created,
    renamed, removed) lasts once its folder is fsynced. Names are undone in reverse order, bytes by truncation to the
    last fsynced length.

    Attributes:
        names, data: which of the two is lost at `strike`.
    """

    names: bool = True
    data: bool = True
    _last: Operation | None = None
    _undo: list[_Undo] = field(default_factory=list)
    _safe_length: dict[int, int] = field(default_factory=dict)
    _folders: set[Path] = field(default_factory=set)

    def before(self, operation: Operation) -> None:
        """Note the operation that has just ended, and what the coming one would destroy."""
        self._settle()
        self._last = operation
        path, target = operation.path, operation.target
        self._folders.add(path.parent)
        if operation.kind == "rename" and target is not None:
            self._folders.add(target.parent)
            replaced = target.read_bytes() if target.is_file() else None
            self._undo.append(_Undo("rename", path, {path.parent, target.parent}, target, replaced))
        elif operation.kind == "unlink":
            content = path.read_bytes() if path.is_file() else None
            self._undo.append(_Undo("unlink", path, {path.parent}, content=content))
        elif operation.kind == "rmdir":
            self._undo.append(_Undo("rmdir", path, {path.parent}))
        elif operation.kind in ("append", "truncate") and path.exists():
            self._safe_length.setdefault(path.stat().st_ino, path.stat().st_size)

    def _settle(self) -> None:
        """The last operation has happened."""
        operation, self._last = self._last, None
        if operation is None:
            return
        path = operation.path
        if operation.kind == "open" and path.exists():
            self._safe_length[path.stat().st_ino] = 0
            self._undo.append(_Undo("open", path, {path.parent}))
        elif operation.kind == "mkdir" and path.exists():
            self._undo.append(_Undo("mkdir", path, {path.parent}))
        elif operation.kind == "fsync" and path.exists():
            self._safe_length[path.stat().st_ino] = path.stat().st_size
        elif operation.kind == "fsync_dir":
            for undo in self._undo:
                undo.folders.discard(path)
            for n, lasting in enumerate(self._undo):
                if not lasting.folders and lasting.kind == "rename" and lasting.target is not None:
                    for earlier in self._undo[:n]:
                        earlier.moved(lasting.path, lasting.target)
            self._undo = [undo for undo in self._undo if undo.folders]

    def strike(self) -> None:
        """Take away what was not yet certain."""
        last, self._last = self._last, None
        if last is not None and last.kind in ("rename", "unlink", "rmdir"):
            self._undo.pop()  # noted, but it has not happened
        if self.data:
            for folder in [f for f in self._folders if f.is_dir()]:
                for path in folder.iterdir():
                    if path.is_file() and (safe := self._safe_length.get(path.stat().st_ino)) is not None:
                        os.truncate(path, min(safe, path.stat().st_size))
        if self.names:
            for undo in reversed(self._undo):
                undo.do()

"""One writer per run folder: flock on `run.lock`, which also says who holds it.

The kernel releases the lock when the holder dies, however it dies. The file's content covers the places where flock
says nothing (some network disks): a holder counts as dead only on proof, which is that the same kernel (boot id) no
longer has its pid, or has it for a process that started at another time.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import psutil

from luthier.core import Locked
from luthier.runs import durable

__all__ = ["Lock", "holder_is_dead", "myself"]

_held: set[int] = set()  # descriptors, not objects: an object may be gone while its descriptor is still open


def myself() -> dict[str, Any]:
    """Who this process is: pid, start time (seconds since 1970; clock ticks since the boot), host, boot id."""
    return {
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "ticks": _ticks(os.getpid()),
        "host": socket.gethostname(),
        "boot": _boot_id(),
    }


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else f"boot-{psutil.boot_time():.0f}"


def _ticks(pid: int) -> int | None:
    """When a process started, in clock ticks since the boot; None where the kernel does not say.

    A start time in seconds since 1970 moves with the wall clock when that is set; this one does not.
    """
    try:
        # The name, in brackets, may hold blanks and brackets; the start is the 20th field after it.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


def holder_is_dead(holder: dict[str, Any]) -> bool:
    """Whether there is proof that the process that `holder` describes no longer runs.

    Another kernel proves it only if the host is the same one, started anew.
    """
    if holder.get("boot") != _boot_id():
        return holder.get("host") == socket.gethostname()
    try:
        process = psutil.Process(int(holder.get("pid", -1)))
        ticks = _ticks(process.pid)
        if isinstance(holder.get("ticks"), int) and ticks is not None:
            same = ticks == holder["ticks"]
        else:
            # A clock step moves this start time a little; another process differs by far more than its pid's age.
            same = abs(process.create_time() - float(holder.get("started", 0))) < 0.05
        return not same or process.status() == psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, ValueError):
        return True


class Lock:
    """The lock of one run folder.

    Args:
        path: the file `run.lock`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None
        self.took_over_from: dict[str, Any] | None = None

    @property
    def held(self) -> bool:
        """Whether this process holds it through this object."""
        return self._fd in _held

    def acquire(self, *, take_over: bool = False) -> None:
        """Take the lock, at once or not at all.

        Args:
            take_over: take it from a holder whose death cannot be proven (on another host), on the user's word.

        Raises:
            Locked: another process holds it; names its pid and host.
            ResourceError: the file cannot be opened.
        """
        if self.held:
            return
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise durable.explain(error, self.path, "opening the lock") from error
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise durable.explain(error, self.path, "locking") from error
                raise Locked(self._refusal(_read(fd))) from error
            holder = _read(fd)
            if holder and not take_over and not holder_is_dead(holder):
                raise Locked(self._refusal(holder))
            self.took_over_from = holder or None
            text = durable.encode(myself())
            os.ftruncate(fd, 0)
            os.pwrite(fd, text, 0)
            os.fsync(fd)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        _held.add(fd)

    def release(self) -> None:
        """Give it back, and say so in the file."""
        if self._fd is not None and self.held:
            with contextlib.suppress(OSError):  # a full disk must not keep the lock; the kernel's part is what counts
                os.ftruncate(self._fd, 0)
            os.close(self._fd)
            _held.discard(self._fd)
            self._fd = None

    def _refusal(self, holder: dict[str, Any]) -> str:
        folder, here = self.path.parent, holder.get("host") == socket.gethostname()
        if not holder:
            return f"{folder}: another process is just taking this run folder. Wait for it, or choose another folder."
        who = f"process {holder.get('pid')} on {'this host, ' if here else ''}{holder.get('host')}"
        if here:
            return f"{folder}: {who}, is writing to this run folder. Wait for it or stop it (kill {holder.get('pid')})."
        return (
            f"{folder}: {who} holds this run folder, and from here nothing proves that it is dead."
            f" If you know that it is, delete {self.path} and run the same command again."
        )


def _read(fd: int) -> dict[str, Any]:
    text = os.pread(fd, 4096, 0)
    try:
        value = json.loads(text.decode()) if text else {}
    except ValueError:
        return {}  # torn while it was written: its writer had the kernel's lock, and that one is the proof
    return value if isinstance(value, dict) else {}


def _forget_in_child() -> None:
    """A forked child (a data worker) must not keep the lock alive after its parent's death."""
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)

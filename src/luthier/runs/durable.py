"""The only place that writes what must last.

Each durable operation (open, write, fsync, rename, fsync of a folder, unlink, mkdir, ...) passes through one numbered
layer, so that a test can ask for a kill, a full disk or a power loss at operation k, and try every k (`runs.fault`).

A file is written beside its place under a private temporary name, digested while it is written, fsynced, and given its
name by ONE rename, followed by an fsync of the folder. A folder is built the same way: all of it, then one rename. So a
name either holds everything or does not exist.

Names that begin with `.tmp-` are unfinished and names that begin with `.del-` are on their way out: neither is ever
read, and `sweep` removes both.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core import ConfigError, DiskFull, LuthierError, ResourceError
from luthier.runs.fault import Operation, parse_fault
from luthier.runs.tensorfile import pieces

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

__all__ = [
    "MANIFEST",
    "Folder",
    "Listener",
    "append",
    "count_ops",
    "encode",
    "folder",
    "install",
    "make_folder",
    "remove",
    "remove_folder",
    "rename",
    "scope",
    "sweep",
    "sync",
    "truncate",
    "uninstall",
    "write_bytes",
    "write_json",
    "write_new",
    "write_tensors",
]

MANIFEST = "MANIFEST.json"
CHUNK = 4 << 20  # bytes per write, about
BUFFERS = 512  # per write; Linux takes up to 1,024
THREADED_FROM = 1 << 20  # below this many bytes a thread costs more than it saves
EARLY_FROM = 4 << 20  # from this many bytes on, a folder's files are fsynced before their digests are known

Buffer = bytes | memoryview


class Listener(Protocol):
    """Hears of each durable operation before it happens, and may prevent it by raising."""

    def before(self, operation: Operation) -> None:
        """Called in the order of the operations."""


_listeners: list[Listener] = []
_scopes: ContextVar[tuple[str, ...]] = ContextVar("durable_scopes", default=())

if os.environ.get("LUTHIER_FAULT"):
    _listeners.append(parse_fault(os.environ["LUTHIER_FAULT"]))


def install(listener: Listener) -> None:
    """Let `listener` hear of each operation. While there is one, operations happen strictly one after another."""
    _listeners.append(listener)


def uninstall(listener: Listener) -> None:
    """Undo `install`."""
    _listeners.remove(listener)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Name the operations inside the block, so that a fault can be asked for at the k-th of them."""
    token = _scopes.set((*_scopes.get(), name))
    try:
        yield
    finally:
        _scopes.reset(token)


class _Counter:
    def __init__(self) -> None:
        self.operations: list[Operation] = []

    def before(self, operation: Operation) -> None:
        self.operations.append(operation)


def count_ops(work: Callable[[], object], within: str = "*") -> list[Operation]:
    """Run `work` and return its durable operations in order; `within` keeps those of one scope."""
    counter = _Counter()
    install(counter)
    try:
        work()
    finally:
        uninstall(counter)
    return [o for o in counter.operations if within == "*" or within in o.scopes]


def _op(kind: str, path: Path, target: Path | None = None, half: Callable[[], None] | None = None) -> None:
    if _listeners:
        operation = Operation(kind, path, target, half, _scopes.get())
        for listener in list(_listeners):
            listener.before(operation)


@contextlib.contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into an error of ours that names the path and says what to do."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error


def explain(error: OSError, path: Path, doing: str) -> LuthierError:
    """The error of ours for an OSError met while `doing` something (such as "writing") to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull(
            f"{path}: no space left while {doing} ({error.strerror}). Nothing half-written was kept."
            " Free some space, or choose a folder on another disk, and run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ResourceError(
            f"{path}: not allowed while {doing} ({error.strerror})."
            " Choose a folder that this user can write to, or remount the disk for writing."
        )
    return ResourceError(
        f"{path}: the disk failed while {doing} ({error.strerror or error}). What was complete before is untouched."
        " Check the disk, then run the same command again."
    )


# --- single operations -----------------------------------------------------------------------------------------------


def make_folder(path: Path) -> None:
    """Make one folder that only this user can read (0700), and make its name last.

    Raises:
        DiskFull, ResourceError: it cannot be made.
    """
    with _explained(path, "making the folder"):
        _op("mkdir", path)
        path.mkdir(mode=0o700)
        _sync_folder(path.parent)


def rename(old: Path, new: Path) -> None:
    """Give `old` the name `new` in one operation, and make that last.

    Raises:
        DiskFull, ResourceError: it cannot be renamed.
    """
    with _explained(new, "renaming"):
        _op("rename", old, new)
        old.rename(new)
        _sync_folder(new.parent)


def remove(path: Path) -> None:
    """Remove one file.

    Raises:
        ResourceError: it cannot be removed.
    """
    with _explained(path, "removing the file"):
        _op("unlink", path)
        path.unlink()


def remove_folder(path: Path) -> None:
    """Remove a folder and all in it. Give it a `.del-` name first if a half of it must never be read.

    Raises:
        ResourceError: something in it cannot be removed.
    """
    with _explained(path, "removing the folder"):
        for item in sorted(path.iterdir()):
            if item.is_dir() and not item.is_symlink():
                remove_folder(item)
            else:
                remove(item)
        _op("rmdir", path)
        path.rmdir()


def sweep(place: Path, of: str = "") -> list[str]:
    """Remove what a killed process left in `place`: `.tmp-*` and `.del-*`. Returns the names removed.

    A folder that a living process is still building is left alone.

    Args:
        of: only what was to become a folder of this name.

    Raises:
        ResourceError: something cannot be removed.
    """
    prefixes = (f".tmp-{of}-", f".del-{of}-") if of else (".tmp-", ".del-")
    left = sorted(p for p in place.iterdir() if p.name.startswith(prefixes)) if place.is_dir() else []
    gone = []
    for path in left:
        sign = _sign(path)
        if sign is None:
            continue  # somebody is building it, or has just removed it
        try:
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            else:
                remove(path)
        finally:
            if sign >= 0:
                os.close(sign)
        gone.append(path.name)
    return gone


def _sign(path: Path) -> int | None:
    """Show other processes that this one works on `path`: they leave it alone until the descriptor is closed.

    The kernel takes the sign away when its holder dies, however it dies.

    Returns:
        None where another process shows its own, or `path` is gone; -1 where nobody can show one (a link, a network
        disk that knows no locks).
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        return None if error.errno == errno.EWOULDBLOCK else -1
    if not path.exists():  # removed between opening and locking
        os.close(fd)
        return None
    return fd


def append(fd: int, path: Path, data: bytes, *, lasting: bool) -> None:
    """Append `data` to the open file `fd` in one write; with `lasting`, return only once it is on the disk.

    Raises:
        DiskFull, ResourceError: it cannot be written. What was written of it is taken back, so that a later line
            does not continue a torn one.
    """
    before = os.fstat(fd).st_size
    with _explained(path, "appending a line"):
        try:
            _op("append", path, half=lambda: _write_all(fd, [data[: len(data) // 2]]))
            _write_all(fd, [data])
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report; replay drops a torn tail
                os.ftruncate(fd, before)
            raise
        if lasting:
            sync(fd, path)


def sync(fd: int, path: Path) -> None:
    """Return only once all that was written to `fd` is on the disk.

    Raises:
        DiskFull, ResourceError: the disk says it is not.
    """
    with _explained(path, "making it last"):
        _op("fsync", path)
        os.fsync(fd)


def truncate(fd: int, path: Path, length: int) -> None:
    """Cut the open file to `length` bytes, and make that last.

    Raises:
        ResourceError: it cannot be cut.
    """
    with _explained(path, "cutting off a torn line"):
        _op("truncate", path)
        os.ftruncate(fd, length)
        sync(fd, path)


def _sync_folder(path: Path) -> None:
    _op("fsync_dir", path)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_all(fd: int, parts: Sequence[Buffer]) -> None:
    """Write at most `BUFFERS` buffers, without joining them."""
    waiting = [memoryview(part) for part in parts if len(part)]
    while waiting:
        done = os.writev(fd, waiting)
        while waiting and done >= len(waiting[0]):
            done -= len(waiting.pop(0))
        if done:
            waiting[0] = waiting[0][done:]


# --- one file --------------------------------------------------------------------------------------------------------


class _Draft:
    """One new file on its way to the disk: made and written; then `sync`, `digest`, `close`.

    A large file is digested in a thread beside the writing and the fsync (all three let other threads run), and the
    disk is asked to begin with each chunk as soon as it is written, so that the cost is that of the slowest of the
    three and not their sum. Only the thread that saves issues durable operations, so their order is always the same.
    The fsync is left to `sync` (fsyncs in parallel were measured to be slower).
    """

    def __init__(self, path: Path, parts: list[Buffer]) -> None:
        self.path = path
        self.n_bytes = sum(len(part) for part in parts)
        self._sha256 = hashlib.sha256()
        self._thread: threading.Thread | None = None
        _op("open", path)
        # O_EXCL and O_NOFOLLOW: the name is ours alone, never a link that somebody put there.
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        if self.n_bytes >= THREADED_FROM:
            self._thread = threading.Thread(target=self._update, args=(parts,), name="luthier-digest")
            self._thread.start()
        else:
            self._update(parts)
        try:
            start = 0
            for chunk in _chunks(parts):
                _op("write", path, half=partial(_write_half, self._fd, chunk))
                _write_all(self._fd, chunk)
                n_bytes = sum(map(len, chunk))
                # On Linux this begins the transfer and returns; it promises nothing, the fsync does. Files that have
                # all begun also share one commit of the disk's journal when they are fsynced one after another.
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self._fd, start, n_bytes, os.POSIX_FADV_DONTNEED)
                start += n_bytes
        except BaseException:
            self.close()
            raise

    def _update(self, parts: list[Buffer]) -> None:
        for part in parts:
            self._sha256.update(part)

    def sync(self) -> None:
        """Return once the content is on the disk.

        Raises:
            OSError: it is not.
        """
        _op("fsync", self.path)
        os.fsync(self._fd)

    def digest(self) -> str:
        """SHA-256 of the content."""
        if self._thread is not None:
            self._thread.join()
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Let go of the file and of the memory it was written from."""
        if self._thread is not None:
            self._thread.join()
        os.close(self._fd)


def _chunks(parts: list[Buffer]) -> Iterator[list[Buffer]]:
    """The same bytes, some buffers at a time: a write for each of a thousand bias vectors would cost more."""
    waiting: list[Buffer] = []
    room = CHUNK
    for part in parts:
        for start in range(0, len(part), CHUNK):
            piece = part[start : start + CHUNK] if len(part) > CHUNK else part
            if waiting and (len(piece) > room or len(waiting) == BUFFERS):
                yield waiting
                waiting, room = [], CHUNK
            waiting.append(piece)
            room -= len(piece)
    if waiting:
        yield waiting


def _write_half(fd: int, parts: list[Buffer]) -> None:
    """Write the first half of the bytes of one write: what a fault in the middle of it leaves."""
    left = sum(map(len, parts)) // 2
    halves: list[Buffer] = []
    for part in parts:
        halves.append(part[:left])
        left -= len(halves[-1])
    _write_all(fd, halves)


def _write_file(path: Path, parts: list[Buffer]) -> str:
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    with _explained(path, "writing"):
        try:
            draft = _Draft(temporary, parts)
            try:
                draft.sync()
                digest = draft.digest()
            finally:
                draft.close()
            _op("rename", temporary, path)
            temporary.replace(path)
        except OSError:
            _discard(temporary)
            raise
        _sync_folder(path.parent)
    return digest


def _discard(path: Path) -> None:
    """Remove what failed to be written. A failure to remove it is not reported: `sweep` will try again."""
    with contextlib.suppress(OSError, ResourceError):
        if path.is_dir():
            remove_folder(path)
        elif path.exists():
            remove(path)


def write_bytes(path: Path, data: bytes) -> str:
    """Write a file, whole or not at all, in place of any older one. Returns its SHA-256.

    Raises:
        DiskFull: it does not fit.
        ResourceError: it cannot be written. In both cases an older file is untouched.
    """
    return _write_file(path, [data])


def write_json(path: Path, value: object) -> str:
    """Write plain values as JSON, whole or not at all. Returns the SHA-256 of the file.

    Raises:
        DiskFull, ResourceError: as `write_bytes`.
    """
    return _write_file(path, [encode(value)])


def write_new(path: Path, value: object) -> bool:
    """Write plain values as JSON under a name that nobody has taken yet, whole or not at all.

    Returns:
        whether it was written; False where a file of that name stands there, which is left as it is. Of several
        processes that try at once, one is told True.

    Raises:
        DiskFull, ResourceError: it cannot be written.
    """
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
    _write_file(temporary, [encode(value)])
    try:
        with _explained(path, "writing"):
            _op("link", temporary, path)
            try:
                os.link(temporary, path)  # unlike a rename, it fails where the name is taken; atomic over NFS too
            except FileExistsError:
                return False
            _sync_folder(path.parent)
    finally:
        _discard(temporary)
    return True


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> str:
    """Write a safetensors file, whole or not at all. The same tensors give the same bytes. Returns its SHA-256.

    Raises:
        ConfigError: a tensor is of a type that safetensors cannot hold.
        DiskFull, ResourceError: as `write_bytes`.
    """
    return _write_file(path, pieces(tensors, metadata or {}))


def encode(value: object) -> bytes:
    """The one way we write JSON: sorted keys, indented by one, no NaN, a newline at the end.

    Raises:
        ConfigError: a value is not plain, or a number is not finite (JSON has no word for it).
    """
    try:
        text = json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        return (text + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ConfigError(f"cannot be written as JSON: {error}. Use plain values and finite numbers.") from error


# --- one folder ------------------------------------------------------------------------------------------------------


class Folder:
    """A folder that is being built under a temporary name; made by `folder(...)`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._drafts: dict[str, _Draft] = {}

    def write_bytes(self, name: str, data: bytes) -> None:
        """Add a file."""
        self._write(name, [data])

    def write_json(self, name: str, value: object) -> None:
        """Add plain values as JSON."""
        self._write(name, [encode(value)])

    def write_tensors(
        self, name: str, tensors: Mapping[str, "Tensor | NDArray[Any]"], metadata: Mapping[str, str] | None = None
    ) -> None:
        """Add a safetensors file. The tensors must not change before the `with` block has ended."""
        self._write(name, pieces(tensors, metadata or {}))

    def make_folder(self, name: str) -> None:
        """Add an empty folder (it is not in the manifest)."""
        with _explained(self.path / name, "making the folder"):
            _op("mkdir", self.path / name)
            (self.path / name).mkdir(mode=0o700)

    def _write(self, name: str, parts: list[Buffer]) -> None:
        if name in self._drafts or Path(name).name != name or name.startswith("."):
            raise ValueError(f"{name!r} must be a plain new file name")
        with _explained(self.path / name, "writing"):
            self._drafts[name] = _Draft(self.path / name, parts)

    def share(self) -> None:
        """Give folder and files the ordinary permissions, those that the umask leaves: they are made to be given away.

        Files that another library has written into the folder are brought to the disk too.
        """
        with _explained(self.path, "setting permissions"):
            trial = self.path / ".tmp-mode"
            trial.mkdir()  # the one way to read the umask that touches no other thread
            mode = trial.stat().st_mode & 0o777
            trial.rmdir()
            for path in sorted(p for p in self.path.rglob("*") if not p.name.startswith(".")):
                path.chmod(mode if path.is_dir() else mode & 0o666)
                if path.is_file() and path.name not in self._drafts:
                    _op("fsync", path)
                    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        os.fsync(fd)
                    finally:
                        os.close(fd)
            self.path.chmod(mode)

    def _finish(self, facts: Mapping[str, Any] | None) -> None:
        """Write the manifest and return once all is on the disk."""
        drafts = list(self._drafts.values())
        large = sum(draft.n_bytes for draft in drafts) >= EARLY_FROM
        if large:
            # The digests take a while yet: let the disk work meanwhile. (Small files are all written first: one commit
            # of the disk's journal then serves them all, the manifest among them.)
            self._sync(drafts)
            drafts = []
        if facts is not None:
            files = {n: {"bytes": draft.n_bytes, "sha256": draft.digest()} for n, draft in self._drafts.items()}
            content = {**facts, "files": files}
            self._write(MANIFEST, [encode({**content, "digest": manifest_digest(content)})])
            drafts.append(self._drafts[MANIFEST])
        self._sync(drafts)
        with _explained(self.path, "making it last"):
            _sync_folder(self.path)

    def _sync(self, drafts: list[_Draft]) -> None:
        for draft in drafts:
            with _explained(draft.path, "writing"):
                draft.sync()

    def _close(self) -> None:
        for draft in self._drafts.values():
            draft.close()
        self._drafts.clear()


def manifest_digest(content: Mapping[str, Any]) -> str:
    """The manifest's digest of itself: of all but the field "digest"."""
    return hashlib.sha256(encode({k: v for k, v in content.items() if k != "digest"})).hexdigest()


@contextlib.contextmanager
def folder(target: Path, manifest: Mapping[str, Any] | None = None) -> Iterator[Folder]:
    """Build a folder that appears whole, in one rename, when the block ends; after an error, not at all.

    Args:
        target: must not exist, or be an empty folder. Its parent must exist.
        manifest: with it (it may be empty), MANIFEST.json holds these facts, the size and SHA-256 of each file, and its
            own digest.

    Raises:
        DiskFull: it does not fit.
        ResourceError: it cannot be written.
    """
    sign = None
    while sign is None:  # another process that sweeps may take the folder in the moment before it is signed
        temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex}")
        with _explained(target, "making the folder"):
            _op("mkdir", temporary)
            temporary.mkdir(mode=0o700)
        sign = _sign(temporary)
    draft = Folder(temporary)
    try:
        try:
            yield draft
            draft._finish(manifest)
        finally:
            draft._close()
        with _explained(target, "renaming"):
            _op("rename", temporary, target)
            temporary.rename(target)
    except BaseException:
        _discard(temporary)
        raise
    finally:
        if sign >= 0:
            os.close(sign)
    with _explained(target, "making it last"):
        _sync_folder(target.parent)

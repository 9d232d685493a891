"""Walls of the kernel around a test's own process, where it allows them; and a hook that hears what goes out."""

import ctypes
import os
import sys
from typing import Any

__all__ = ["listen", "mount_tmpfs", "namespaces", "read_only", "remount"]

_CLONE = {"mount": 0x00020000, "network": 0x40000000}
_MNT_DETACH = 2
_NEW_USER = 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18


def namespaces(*kinds: str) -> bool:
    """Give this process its own network or table of mounts; False where the kernel refuses. One thread only."""
    libc = ctypes.CDLL(None, use_errno=True)
    flags = sum(_CLONE[kind] for kind in kinds)
    if libc.unshare(flags) != 0 and libc.unshare(flags | _NEW_USER) != 0:
        return False
    # Mounts made here must not be seen outside.
    return "mount" not in kinds or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) == 0


def mount_tmpfs(place: str, n_bytes: int) -> bool:
    """A disk of its own of so many bytes at `place`."""
    return _mount("tmpfs", place, 0, f"size={n_bytes}")


def read_only(place: str) -> bool:
    """An empty disk at `place` on which nothing can be written."""
    return _mount("tmpfs", place, _MS_RDONLY, "size=4096")


def remount(place: str, *, read_only: bool) -> bool:
    """Turn the disk at `place` read-only, as a kernel does after an error of the disk, or back."""
    libc, where = ctypes.CDLL(None, use_errno=True), os.fsencode(place)
    if not read_only:
        return bool(libc.umount2(where, _MNT_DETACH) == 0)
    # A disk with files open for writing cannot be turned as a whole; a second mount of it in the same place can.
    laid_over = libc.mount(where, where, None, _MS_BIND, None) == 0
    return laid_over and libc.mount(None, where, None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY, None) == 0


def _mount(kind: str, place: str, flags: int, options: str) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.mount(b"luthier-test", os.fsencode(place), kind.encode(), flags, options.encode()) == 0)


def listen(heard: list[str]) -> None:
    """From now on, keep every attempt of this process to speak to the network or to use shared memory."""

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"):
            heard.append(f"{event} {given[1:]}")
        elif event == "open" and isinstance(given[0], str) and given[0].startswith("/dev/shm"):
            heard.append(f"open {given[0]}")

    sys.addaudithook(hook)

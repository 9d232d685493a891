"""Opening a file that somebody else wrote: regular files only, never more bytes than a cap."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from luthier.core import BadInput, Refused, human_bytes, near

__all__ = ["identity", "open_regular", "read_capped", "show"]


def show(value: object, width: int = 80) -> str:
    """Quote a foreign value for a message: escaped, so that it is inert in a terminal, and cut at `width` characters.

    >>> show("a\\x1b[31mb")
    "'a\\\\x1b[31mb'"
    """
    text = ascii(value[: width + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= width else text[: width - 3] + "..."


def open_regular(path: str | os.PathLike[str]) -> BufferedReader:
    """Open `path` for reading if it is a regular file. A link to one is followed: model caches are made of links.

    Raises:
        BadInput: there is no such file (near names are offered), or it may not be read.
        Refused: it is a folder, a pipe, a device or a socket.
    """
    path = Path(path)
    try:
        # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadInput(f"{show(str(path), 200)}: there is no such file.{_near_files(path)}") from None
    except ValueError as error:  # a NUL in the name
        raise BadInput(f"{show(str(path), 200)}: not a usable file name ({error}).") from None
    except OSError as error:
        raise BadInput(
            f"{show(str(path), 200)}: cannot be opened ({error.strerror}). Check its type, place and permissions."
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Refused(
            f"{show(str(path), 200)}: not a regular file but a folder, pipe, device or socket. Give the path of a file."
        )
    return os.fdopen(handle, "rb")


def read_capped(path: str | os.PathLike[str], cap: int, what: str) -> bytes:
    """All bytes of `path`, if they are at most `cap`.

    Raises:
        BadInput: no such file.
        Refused: not a regular file, or more than `cap` bytes.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # The size may lie (a file of /proc says 0) or change while we read, so the read is capped as well. It grows by
        # pieces: read(n) makes room for n bytes at once.
        content = bytearray()
        while size <= cap and len(content) <= cap and (piece := file.read(min(max(size, 1 << 16), cap) + 1)):
            content += piece
    if size > cap or len(content) > cap:
        raise Refused(
            f"{show(str(path), 200)}: {human_bytes(max(size, len(content)))}; {what} may have {human_bytes(cap)} "
            "at most. Raise the cap with a Limits object if you made this file yourself."
        )
    return bytes(content)


def identity(file: BufferedReader) -> tuple[int, int, int, int]:
    """(device, inode, size, mtime in ns) of an open file: if it is the same afterwards, nobody wrote meanwhile."""
    facts = os.fstat(file.fileno())
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _near_files(path: Path) -> str:
    try:
        names = [entry.name for entry in os.scandir(path.parent)][:10_000]
    except OSError:
        return f" Its folder {show(str(path.parent), 200)} is not there either."
    return near(path.name, names) or f" Its folder holds {len(names)} other entries, none of a similar name."

"""Archives, by an extractor of our own: regular files and folders only, into a new folder, or nothing.

Everything is written into a private folder beside the target, which becomes the target in one rename when all members
passed. There is no call of `extractall`: the filters of the standard library have been escaped before.
"""

import bz2
import gzip
import lzma
import os
import re
import shutil
import stat
import struct
import tempfile
import unicodedata
import zipfile
import zlib
from collections.abc import Collection
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

from luthier.core import BadInput, DiskFull, Refused, human_bytes, near
from luthier.trust._bytes import open_regular, show
from luthier.trust._limits import Limits

__all__ = ["extract"]

_CHUNK = 1 << 18
# What the standard library raises over damaged archives; the last three come from names and dates it cannot read.
_BAD_ARCHIVE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, NotImplementedError),
    *(ValueError, IndexError, OverflowError),
)


def extract(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    members: Collection[str] | None = None,
    *,
    limits: Limits = Limits(),  # noqa: B008  # frozen
) -> list[Path]:
    """Unpack a zip (a wheel is one) or a tar (plain, gz, bz2, xz).

    Args:
        path: the archive; its kind is told from its first bytes, not from its name.
        target: a folder that does not exist yet, or is empty.
        members: take only these; all others are still checked by name, but not unpacked.
        limits: caps on members, unpacked bytes and ratio.

    Returns:
        The files written, in the order of the archive.

    Raises:
        BadInput: no such file, a member that is not there, or a target that holds something.
        Refused: a link, a device, a path that leaves the target, two names that differ by case, a bomb, damage.
        DiskFull: it did not fit; nothing is left behind.
    """
    source, target = Path(path), Path(target)
    where = show(str(source), 200)
    if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
        raise BadInput(f"{show(str(target), 200)}: is there already and not an empty folder. Choose a new folder.")
    with open_regular(source) as file:
        first = file.read(512)
        file.seek(0)
        target.parent.mkdir(parents=True, exist_ok=True)
        private = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target.parent))  # 0700
        try:
            book = _Book(where, limits, os.fstat(file.fileno()).st_size, members)
            if first[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                written = _zip(file, private, book)
            else:
                # Read twice, and checked twice: the first time nothing is written.
                _tar(_opened(file, first, where), None, book)
                file.seek(0)
                book = _Book(where, limits, book.size, members)
                written = _tar(_opened(file, first, where), private, book)
            book.all_found()
            private.rename(target)
        except _BAD_ARCHIVE as error:
            raise Refused(f"{where}: damaged ({show(str(error), 120)}). Fetch it again.") from None
        except OSError as error:
            if error.errno in (28, 122):  # ENOSPC, EDQUOT
                raise DiskFull(f"{where}: unpacking it does not fit below {show(str(target.parent), 200)}.") from None
            raise Refused(f"{where}: cannot be unpacked ({show(str(error), 120)}). Fetch it again.") from None
        finally:
            shutil.rmtree(private, ignore_errors=True)
    return [target / name for name in written]


class _Book:
    """What one archive has claimed so far."""

    def __init__(self, where: str, limits: Limits, size: int, wanted: Collection[str] | None) -> None:
        self.where, self.limits, self.size = where, limits, size
        self.wanted = None if wanted is None else set(wanted)
        self.names: dict[str, str] = {}  # folded name -> name as written
        self.files: set[str] = set()
        self.bytes = self.members = 0
        # A small archive may hold a few empty or very even files; a megabyte of them harms nobody.
        self.most = min(limits.unpacked_bytes, limits.ratio * size + 1_000_000)

    def enter(self, name: str, *, folder: bool, size: int) -> str:
        """Check one member's name and size; return the clean relative name."""
        where, limits = self.where, self.limits
        label = f"{where}: member {show(name)}"
        parts = name.rstrip("/").split("/") if folder else name.split("/")
        if len(name) > limits.path_chars or len(parts) > limits.depth or any(len(os.fsencode(p)) > 255 for p in parts):
            raise Refused(f"{label}: its name is too long or too deep. Refuse its source.")
        if not name.isprintable() or "\\" in name or re.match(r"[A-Za-z]:", name):
            raise Refused(f"{label}: its name holds a control character, a backslash or a drive. Refuse its source.")
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise Refused(f"{label}: its path leaves the folder or is not a plain relative one. Refuse its source.")
        if any(part != part.rstrip(" .") for part in parts):
            raise Refused(f"{label}: a part of its name ends in a blank or dot. Refuse its source.")
        clean = "/".join(parts)
        folded = unicodedata.normalize("NFC", clean).casefold()
        if folded in self.names and not (folder and self.names[folded] == clean and clean not in self.files):
            raise Refused(f"{label}: the same name as {show(self.names[folded])}, or differing only by case.")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            kept = self.names.setdefault(unicodedata.normalize("NFC", above).casefold(), above)
            if kept != above or above in self.files:
                raise Refused(
                    f"{label}: lies below {show(kept)}, which is a file or differs by case. Refuse its source."
                )
        self.names[folded] = clean
        if not folder:
            self.files.add(clean)
        self.members += 1
        if max(self.members, len(self.names)) > limits.members:
            raise Refused(f"{where}: more than {limits.members} members; raise Limits.members if you made it yourself.")
        if size < 0:
            raise Refused(f"{label}: a negative size. Refuse its source.")
        self.add(size)
        return clean

    def add(self, size: int) -> None:
        """Count `size` more bytes of the unpacked archive."""
        self.bytes += size
        if self.bytes > self.most:
            raise Refused(
                f"{self.where}: would unpack to more than {human_bytes(self.most)} from {human_bytes(self.size)}: "
                "a bomb. Raise Limits.unpacked_bytes or Limits.ratio if you made it yourself."
            )

    def takes(self, name: str) -> bool:
        return self.wanted is None or name in self.wanted

    def all_found(self) -> None:
        for name in sorted((self.wanted or set()) - self.files):
            raise BadInput(f"{self.where}: holds no member {show(name)}.{near(name, sorted(self.files))}")


def _write(source: IO[bytes], size: int, place: Path, label: str) -> None:
    """Copy exactly `size` bytes of `source` into a new file."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(handle, "wb") as out:
        left = size
        while left:
            piece = source.read(min(_CHUNK, left))
            if not piece:
                raise Refused(f"{label}: shorter than it claims. The archive is cut off: fetch it again.")
            out.write(piece)
            left -= len(piece)


def _zip(file: BufferedReader, private: Path, book: _Book) -> list[str]:
    where, limits = book.where, book.limits
    # The end record is read first: the library reads the whole table before it can be asked how long it is.
    file.seek(max(0, book.size - 65_557))
    tail = file.read(65_557)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < 22:
        raise Refused(f"{where}: has no table of members. It is cut off: fetch it again.")
    count, table = struct.unpack("<HI", tail[at + 10 : at + 16])
    if count > limits.members or table > limits.members * 200 or table > book.size:
        raise Refused(
            f"{where}: claims {count} members in a table of {table} bytes; at most {limits.members} are read."
        )
    file.seek(0)
    packed, written, starts = 0, [], set()
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        for info in infos:
            label = f"{where}: member {show(info.filename)}"
            if not info.filename or info.orig_filename != info.filename:  # the library cuts names at a NUL
                raise Refused(f"{label}: its name holds a NUL character. Refuse its source.")
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > info.is_dir():
                raise Refused(
                    f"{label}: a link, device or pipe; only files and folders are unpacked. Refuse its source."
                )
            if info.flag_bits & 0x41 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Refused(f"{label}: encrypted, or packed in a way other than deflate. Pack it again plainly.")
            book.enter(info.filename, folder=info.is_dir(), size=info.file_size)
            if info.file_size > limits.ratio * info.compress_size + 1_000_000:
                raise Refused(f"{label}: {info.file_size} bytes from {info.compress_size}: a bomb.")
            if info.header_offset in starts:
                raise Refused(f"{label}: shares its bytes with another member. Refuse its source.")
            starts.add(info.header_offset)
            packed += info.compress_size
        if packed > book.size:
            raise Refused(f"{where}: its members claim {packed} packed bytes, it has {book.size}. Refuse its source.")
        for info in infos:
            name = info.filename.rstrip("/")
            if info.is_dir():
                if book.wanted is None:
                    (private / name).mkdir(parents=True, exist_ok=True)
            elif book.takes(name):
                with archive.open(info) as member:
                    _write(member, info.file_size, private / name, f"{where}: member {show(name)}")
                    if member.read(1):
                        raise Refused(f"{where}: member {show(name)} is longer than it claims. Refuse its source.")
                written.append(name)
    return written


def _opened(file: BufferedReader, first: bytes, where: str) -> IO[bytes]:
    if first[:2] == b"\x1f\x8b":
        return cast(IO[bytes], gzip.GzipFile(fileobj=file))
    if first[:3] == b"BZh":
        return bz2.BZ2File(file)
    if first[:6] == b"\xfd7zXZ\x00":
        return lzma.LZMAFile(file, format=lzma.FORMAT_XZ)
    if first[257:262] == b"ustar":
        return file
    raise Refused(f"{where}: neither zip nor tar (plain, gz, bz2, xz). Fetch it again, or unpack it yourself.")


def _tar(stream: IO[bytes], private: Path | None, book: _Book) -> list[str]:
    where, limits = book.where, book.limits
    written: list[str] = []
    long_name: str | None = None
    long_size: int | None = None
    extras = 0
    while True:
        block = stream.read(512)
        if len(block) < 512:
            if block:
                raise Refused(f"{where}: cut off inside a header. Fetch it again.")
            break
        if not any(block):
            break
        name, kind, size = _tar_header(block, where)
        if kind in (b"x", b"g", b"L"):
            extras += 1
            if size > 65_536 or extras > 2 * limits.members:
                raise Refused(f"{where}: an extended header of {size} bytes, or too many; no honest archive has that.")
            book.add(size)
            body = _exactly(stream, size, where)
            if kind == b"L":
                long_name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == b"x":
                long_name, long_size = _pax(body, where, long_name)
            elif {key for key, _ in _pax_pairs(body, where)} & {"path", "size", "linkpath"}:
                raise Refused(f"{where}: a header for all members sets their path or size. Refuse its source.")
            continue
        if long_name is not None:
            name = long_name
        if long_size is not None:
            size = long_size
        long_name = long_size = None
        if kind not in (b"0", b"\0", b"5"):
            raise Refused(
                f"{where}: member {show(name)} is a link, device or pipe (type {show(kind)}); only files and "
                "folders are unpacked. Refuse its source."
            )
        folder = kind == b"5"
        if folder and size:
            raise Refused(f"{where}: member {show(name)} is a folder with {size} bytes. Refuse its source.")
        name = name.removeprefix("./")  # what `tar c .` writes
        if folder and name.rstrip("/") in ("", "."):
            continue
        name = book.enter(name, folder=folder, size=size)
        if folder:
            if book.wanted is None and private is not None:
                (private / name).mkdir(parents=True, exist_ok=True)
        elif book.takes(name) and private is not None:
            _write(stream, size, private / name, f"{where}: member {show(name)}")
            written.append(name)
        else:
            _skip(stream, size, where)
        _skip(stream, -size % 512, where)
    return written


def _tar_header(block: bytes, where: str) -> tuple[str, bytes, int]:
    total = sum(block) - sum(block[148:156]) + 8 * 32
    if _octal(block[148:156], where) != total:
        raise Refused(f"{where}: the checksum of a header is wrong. It is damaged: fetch it again.")
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345] and (prefix := block[345:500].split(b"\0", 1)[0]):
        name = prefix + b"/" + name
    return name.decode("utf-8", "surrogateescape"), block[156:157], _octal(block[124:136], where)


def _octal(digits: bytes, where: str) -> int:
    if digits[0] == 0x80:  # base 256, for sizes above 8 GB
        return int.from_bytes(digits[1:], "big")
    text = digits.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{0,12}", text):
        raise Refused(f"{where}: {show(digits)} is no number of a tar header (negative, or damaged).")
    return int(text or b"0", 8)


def _pax_pairs(body: bytes, where: str) -> list[tuple[str, str]]:
    pairs = []
    while body.strip(b"\0"):
        found = re.match(rb"(\d{1,6}) ([^=\n]{1,200})=", body)
        length = int(found[1]) if found else 0
        if found is None or length > len(body) or length <= found.end() or body[length - 1 : length] != b"\n":
            raise Refused(f"{where}: an extended header that cannot be read. It is damaged: fetch it again.")
        value = body[found.end() : length - 1]
        pairs.append((found[2].decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")))
        body = body[length:]
    return pairs


def _pax(body: bytes, where: str, name: str | None) -> tuple[str | None, int | None]:
    size = None
    for key, value in _pax_pairs(body, where):
        if key == "path":
            name = value
        elif key == "size":
            if not re.fullmatch(r"\d{1,15}", value):
                raise Refused(f"{where}: {show(value)} is no size of a member. It is damaged: fetch it again.")
            size = int(value)
        elif key.startswith("GNU.sparse"):
            raise Refused(f"{where}: a sparse member, which can claim any size. Pack it again without --sparse.")
    return name, size


def _exactly(stream: IO[bytes], size: int, where: str) -> bytes:
    body = stream.read(size)
    if len(body) != size:
        raise Refused(f"{where}: cut off. Fetch it again.")
    _skip(stream, -size % 512, where)
    return body


def _skip(stream: IO[bytes], size: int, where: str) -> None:
    while size:
        piece = stream.read(min(_CHUNK, size))
        if not piece:
            raise Refused(f"{where}: cut off. Fetch it again.")
        size -= len(piece)

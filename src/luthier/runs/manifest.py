"""Reading a folder that `durable.folder` built: each byte is read once, verified against MANIFEST.json, then used."""

import errno
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core import ConfigError, IntegrityError
from luthier.runs import durable

__all__ = ["Damaged", "Verified", "read_verified"]

MANIFEST_BYTES = 16 << 20  # a longer manifest is not ours


class Damaged(IntegrityError):
    """Something in the folder is missing, too short, too long or different."""


@dataclass(frozen=True)
class Verified:
    """The content of a folder whose every byte is what its manifest says.

    Attributes:
        files: name -> bytes.
        facts: the manifest's own fields, without "files" and "digest".
        extra: names that the manifest does not have; they were not read.
    """

    files: dict[str, bytes]
    facts: dict[str, Any]
    extra: tuple[str, ...]


def read_verified(path: Path) -> Verified:
    """Read and verify the folder at `path`. Parse the bytes that are returned; do not read the files again.

    Raises:
        Damaged: says which file, and what is wrong with it.
    """
    if path.is_symlink() or not path.is_dir():
        raise Damaged(f"{path.name} is not a folder")
    raw = _read(path / durable.MANIFEST, None)
    try:
        manifest = json.loads(raw.decode())
        # Comparing the text as well as the digest finds a changed blank too.
        whole = durable.encode(manifest) == raw and manifest["digest"] == durable.manifest_digest(manifest)
    except (ConfigError, ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise Damaged(f"{durable.MANIFEST} is damaged")
    files: dict[str, bytes] = {}
    for name, claim in manifest["files"].items():
        if Path(name).name != name:
            raise Damaged(f"{durable.MANIFEST} names {name!r}, which is not a file of this folder")
        files[name] = _read(path / name, claim["bytes"])
        if hashlib.sha256(files[name]).hexdigest() != claim["sha256"]:
            raise Damaged(f"{name} is damaged: its SHA-256 is not the one in the manifest")
    extra = tuple(sorted(p.name for p in path.iterdir() if p.name not in files and p.name != durable.MANIFEST))
    return Verified(files, {k: v for k, v in manifest.items() if k not in ("files", "digest")}, extra)


def _read(path: Path, n_bytes: int | None) -> bytes:
    """The content of a regular file, if it is `n_bytes` long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        missing = error.errno == errno.ENOENT
        raise Damaged(f"{path.name} is missing" if missing else f"{path.name}: {error.strerror}") from None
    try:
        facts = os.fstat(fd)
        if not stat.S_ISREG(facts.st_mode):
            raise Damaged(f"{path.name} is not a regular file")
        if n_bytes is None and facts.st_size > MANIFEST_BYTES:
            raise Damaged(f"{path.name} has {facts.st_size} bytes, more than a manifest can have")
        if n_bytes is not None and facts.st_size != n_bytes:
            raise Damaged(f"{path.name} has {facts.st_size} bytes instead of {n_bytes}")
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read()
    except OSError as error:
        raise Damaged(f"{path.name} cannot be read ({error.strerror})") from None
    finally:
        os.close(fd)

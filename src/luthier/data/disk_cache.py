"""What was computed from rows, kept between runs: folders named by a digest of everything they depend on.

<cache>/encoded/<digest>/kept.safetensors   numbers
<cache>/encoded/<digest>/kept.json          words
<cache>/encoded/<digest>/MANIFEST.json      size and SHA-256 of both

<cache> is `luthier.samples.cache_dir()`. An entry is never stale: what differs has another name. Every byte is verified
when it is read. No torch here.

What was used longest ago is removed when the entries pass `LUTHIER_ENCODED_GIB` (4 where it is not set). With 0 nothing
is kept or read, and so with `LUTHIER_PLAIN=1`.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

from luthier.core import ConfigError, IntegrityError, LuthierError, ResourceError, human_bytes
from luthier.core.fast_paths import fast
from luthier.runs import durable, read_verified
from luthier.runs.tensorfile import read_arrays
from luthier.samples import cache_dir

__all__ = ["entry", "limit", "read", "short", "source_digest", "write"]

DEFAULT_GIB = 4.0
NUMBERS, WORDS = "kept.safetensors", "kept.json"


def limit() -> int:
    """Bytes that all entries together may take; 0 where nothing is to be kept.

    Raises:
        ConfigError: `LUTHIER_ENCODED_GIB` is no number from 0 on.
    """
    if not fast():
        return 0
    told = os.environ.get("LUTHIER_ENCODED_GIB", "")
    try:
        gib = float(told) if told else DEFAULT_GIB
    except ValueError:
        gib = -1.0
    if not 0 <= gib < 1e9:
        raise ConfigError(
            f"LUTHIER_ENCODED_GIB is {told!r}; it must be a number of GiB for encoded rows, 0 to keep none."
        )
    return int(gib * 2**30)


def entry(facts: Mapping[str, Any]) -> Path:
    """The folder of what these facts, which JSON must be able to hold, decide."""
    text = json.dumps(facts, sort_keys=True, ensure_ascii=True)
    return cache_dir() / "encoded" / hashlib.sha256(text.encode()).hexdigest()[:40]


def source_digest(modules: Sequence[ModuleType]) -> str:
    """SHA-256, in hexadecimal, of the source of these modules: code that differs computes something else."""
    summed = hashlib.sha256()
    for module in modules:
        summed.update(Path(str(module.__file__)).read_bytes())
    return summed.hexdigest()


def read(folder: Path, what: str) -> tuple[tuple[dict[str, NDArray[Any]], Any] | None, str]:
    """Numbers and words of an entry, or None where they have to be made anew; and what is to be said about it.

    Args:
        what: the entry in words, such as "encoded rows". A damaged one is removed.
    """
    if not folder.is_dir():
        return None, ""
    try:
        found = read_verified(folder)
        arrays = read_arrays(found.files[NUMBERS])
        words = json.loads(found.files[WORDS])
    except (IntegrityError, KeyError) as error:
        _remove(folder)
        return None, f"{what} kept in {folder} are damaged ({error}): they are made anew"
    with contextlib.suppress(OSError):  # a cache that may only be read serves as well
        os.utime(folder)  # used now: what was used longest ago goes first
    return (arrays, words), ""


def short(folder: Path) -> str:
    """An entry's folder for the eye: the first digits of its name are enough to find it by."""
    return f"{folder.parent}/{folder.name[:8]}..."


def write(folder: Path, arrays: Mapping[str, NDArray[Any]], words: Any) -> str:
    """Keep numbers and words; returns why they could not be kept, or nothing. A cache that cannot be written stops
    no run.
    """
    n_bytes, most = sum(a.nbytes for a in arrays.values()), limit()
    if n_bytes > most:
        return f"they take {human_bytes(n_bytes)}, more than LUTHIER_ENCODED_GIB allows"
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with durable.folder(folder, {}) as made:
            made.write_tensors(NUMBERS, arrays)
            made.write_json(WORDS, words)
        _make_room(root, most, folder)
    except (LuthierError, OSError) as error:
        # Where it stands by now, another process was quicker.
        return "" if (folder / durable.MANIFEST).is_file() else str(error).splitlines()[0]
    return ""


def _make_room(root: Path, most: int, newest: Path) -> None:
    """Remove what was used longest ago until the entries take no more than `most` bytes; the newest stays."""
    entries = [p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    sizes = {p: sum(f.stat().st_size for f in p.iterdir()) for p in entries}
    for path in sorted(entries, key=lambda p: (p.stat().st_mtime_ns, p.name)):
        if sum(sizes.values()) <= most:
            return
        if path != newest:
            sizes.pop(path)
            _remove(path)


def _remove(folder: Path) -> None:
    gone = folder.with_name(f".del-{folder.name}-{os.getpid()}")
    # Another process may remove it too, or nobody may: it is verified whenever it is read.
    with contextlib.suppress(ResourceError, OSError):
        durable.rename(folder, gone)
        durable.remove_folder(gone)

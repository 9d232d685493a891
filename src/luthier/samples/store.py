"""Bring a sample into the cache: all of it, checked, or nothing.

<cache>/<name>/             the sample; appears by one rename
<cache>/<name>/MANIFEST.json   digest and bytes of each file, and of the recipe that made them
<cache>/.<name>.lock        held while one process fetches; a second waits and finds the work done
<cache>/.<name>.tmp-*       work under way; what a killed process left is swept by the next fetch
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.core import DataError, DiskFull, IntegrityError, ModelError, ResourceError, human_bytes, plain
from luthier.samples.catalogue import SAMPLES, Sample, find
from luthier.samples.download import download, sha256_of, take_members
from luthier.samples.parsers import PARSERS, Row
from luthier.samples.split import standard_split

__all__ = ["Progress", "cache_dir", "fetch", "is_cached", "model_path", "resolve", "rows", "verify"]

Progress = Callable[[str], None]

FORMAT = 2  # raise it when parsers or the split change what they write; cached samples are then made anew
MANIFEST = "MANIFEST.json"


def cache_dir(cache: str | Path | None = None) -> Path:
    """The folder of all samples: `cache`, else $LUTHIER_CACHE, else luthier/ in $XDG_CACHE_HOME or ~/.cache."""
    if cache is not None:
        return Path(cache)
    if own := os.environ.get("LUTHIER_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path("~/.cache").expanduser()) / "luthier"


def is_cached(name: str, cache: str | Path | None = None) -> bool:
    """Whether the sample lies complete in the cache, by names and sizes; `verify` reads the bytes.

    Raises:
        UnknownName: there is no such sample.
    """
    sample = find(name)
    home = cache_dir(cache) / sample.name
    manifest = _manifest(home)
    if manifest is None or manifest.get("recipe") != _recipe(sample):
        return False
    return all(
        (home / file).is_file() and (home / file).stat().st_size == facts["bytes"]
        for file, facts in manifest["files"].items()
    )


def fetch(name: str, cache: str | Path | None = None, progress: Progress | None = None) -> Path:
    """Return the sample's folder, bringing it here first if need be.

    Args:
        cache: another cache folder than the usual one.
        progress: called with one line per step.

    Raises:
        UnknownName: there is no such sample.
        ResourceError: pip failed, or the cache cannot be written; nothing was kept.
        DiskFull: the disk is full; nothing was kept.
        IntegrityError: the download is not what was pinned; nothing was kept.
    """
    sample = find(name)
    say = progress or (lambda line: None)
    root = cache_dir(cache)
    home = root / sample.name
    if is_cached(sample.name, root):
        return home
    needed = {need: fetch(need, root, progress) for need in sample.needs}
    with _writing(root), _alone(root, sample.name, say):
        if is_cached(sample.name, root):
            return home
        for leftover in root.glob(f".{sample.name}.tmp-*"):  # the lock is ours, so its maker is gone
            shutil.rmtree(leftover)
        work = Path(tempfile.mkdtemp(prefix=f".{sample.name}.tmp-", dir=root))
        try:
            made = _make(sample, work, needed, say)
            _before_rename(sample)
            if home.exists():
                home.rename(work / "replaced")
            made.rename(home)
            _sync_folder(root)
        finally:
            shutil.rmtree(work)
    return home


def verify(name: str, cache: str | Path | None = None) -> dict[str, str]:
    """Read every byte of a cached sample and compare it with the manifest.

    Returns:
        File -> sha256.

    Raises:
        IntegrityError: the sample is not cached, or a file is missing, altered or not listed.
    """
    sample = find(name)
    home = cache_dir(cache) / sample.name
    again = f"Delete {home}; it is fetched anew when next asked for."
    manifest = _manifest(home)
    if manifest is None:
        raise IntegrityError(f"sample:{sample.name} is not in the cache ({home} has no {MANIFEST}).")
    if manifest.get("recipe") != _recipe(sample):
        raise IntegrityError(f"{home} was made by another version of the catalogue. {again}")
    present = {str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()} - {MANIFEST}
    listed = manifest["files"]
    if extra := sorted(present - set(listed)):
        raise IntegrityError(f"{home} holds files that its manifest does not list: {', '.join(extra)}. {again}")
    digests = {}
    for file, facts in listed.items():
        if file not in present:
            raise IntegrityError(f"{home / file} is missing. {again}")
        digests[file] = sha256_of(home / file)
        if digests[file] != facts["sha256"]:
            raise IntegrityError(
                f"{home / file} has changed: expected sha256 {facts['sha256']}, got {digests[file]}. {again}"
            )
    return digests


def model_path(name: str, cache: str | Path | None = None, progress: Progress | None = None) -> Path:
    """The Hugging Face folder of a sample model, fetched first if need be.

    Raises:
        UnknownName, UsageError: no such sample, or a data set. Else as `fetch`.
    """
    return fetch(find(name, "model").name, cache, progress)


def resolve(word: str, cache: str | Path | None = None, progress: Progress | None = None) -> Path | None:
    """The folder meant by `sample:NAME` (fetched first if need be); None where `word` is no such name.

    Raises:
        As `fetch`.
    """
    return fetch(word, cache, progress) if word.startswith("sample:") else None


def rows(cache: str | Path | None = None) -> list[dict[str, Any]]:
    """All samples as plain values, for a listing."""
    return [
        {
            "name": sample.name,
            "kind": sample.kind,
            "task": sample.task,
            "title": sample.title,
            "download_bytes": sample.n_bytes,
            "size": human_bytes(sample.n_bytes),
            "licence": sample.licence,
            "cached": is_cached(sample.name, cache),
            "packages": [f"{pin.name}=={pin.version}" for pin in sample.packages],
            "note": sample.note,
        }
        for sample in SAMPLES.values()
    ]


def _make(sample: Sample, work: Path, needed: dict[str, Path], say: Progress) -> Path:
    """Download, unpack and convert below `work`; return the finished folder."""
    members: dict[str, Path] = {}
    for number, pin in enumerate(sample.packages):
        say(f"{sample.name}: downloading {pin.name} {pin.version} ({human_bytes(pin.n_bytes)})")
        folder = work / f"archive-{number}"
        archive = download(pin, folder)
        taken = take_members(archive, sample.members, work / f"members-{number}")
        if twice := sorted(set(taken) & set(members)):
            raise IntegrityError(f"{sample.name}: two archives hold {twice[0]!r}. Nothing was kept.")
        members |= taken
        shutil.rmtree(folder)
    if missing := [member for member in sample.members if member not in members]:
        raise IntegrityError(f"{sample.name}: the archive lacks {', '.join(missing)}. Nothing was kept.")
    members = {member: members[member] for member in sample.members}
    say(f"{sample.name}: converting")
    made = work / "made"
    made.mkdir()
    if sample.kind == "data":
        _write_data(sample, members, made)
    else:
        _convert_model(sample, members, needed, made)
    files = sorted(p for p in made.rglob("*") if p.is_file())
    listed = {str(p.relative_to(made)): {"sha256": sha256_of(p), "bytes": p.stat().st_size} for p in files}
    _write_json(made / MANIFEST, {"sample": sample.name, "recipe": _recipe(sample), "files": listed})
    for path in [*files, made / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return made


def _write_data(sample: Sample, members: dict[str, Path], made: Path) -> None:
    halves = standard_split(sample.name, PARSERS[sample.parser](members))
    _write_rows(made / "train.jsonl", halves.train)
    _write_rows(made / "test.jsonl", halves.test)
    labels = sorted({row["label"] for row in halves.train + halves.test if "label" in row})
    _write_json(
        made / "info.json",
        {
            "name": sample.name,
            "task": sample.task,
            "label_names": labels,
            "counts": halves.counts,
            "conflicts": halves.conflicts,
            "left_out": halves.left_out,
        },
    )


def _convert_model(sample: Sample, members: dict[str, Path], needed: dict[str, Path], made: Path) -> None:
    """Run the converter in a process of its own: it reads foreign formats and may need gigabytes for a moment."""
    order = {
        "parser": sample.parser,
        "members": {name: str(path.resolve()) for name, path in members.items()},
        "needed": {name: str(path.resolve()) for name, path in needed.items()},
        "made": str(made.resolve()),
    }
    environment = dict(os.environ) | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "luthier.samples.convert"],
        input=json.dumps(order),
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode != 0:
        said = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-6:])
        if "No space left on device" in said:
            raise OSError(errno.ENOSPC, "the converter found no space left")
        if done.returncode == -signal.SIGKILL:
            said = "(killed, most likely because memory ran out)"
        raise ModelError(
            f"sample:{sample.name} could not be converted (status {done.returncode}); nothing was kept. "
            f"The converter's last lines:\n{said}"
        )


def _before_rename(sample: Sample) -> None:
    """The last moment at which nothing of a fetch is visible; tests stop a process here."""


@contextlib.contextmanager
def _writing(root: Path) -> Iterator[None]:
    """Turn what the disk complains about into errors that say what to do."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskFull(
                f"The disk of {root} is full; nothing was kept. Free some space, or set LUTHIER_CACHE to a folder on "
                "another disk."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise ResourceError(
                f"The cache {root} cannot be written ({error.strerror}: {error.filename}). Set LUTHIER_CACHE to a "
                "folder that can be."
            ) from error
        raise


@contextlib.contextmanager
def _alone(root: Path, name: str, say: Progress) -> Iterator[None]:
    """Hold the sample's lock. The lock goes with the process, so a killed fetch never blocks the next one."""
    with (root / f".{name}.lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"{name}: another process is fetching it; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _manifest(home: Path) -> dict[str, Any] | None:
    path = home / MANIFEST
    if not path.is_file():
        return None
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return read if isinstance(read, dict) and isinstance(read.get("files"), dict) else None


def _recipe(sample: Sample) -> str:
    """Digest of all that decides what the sample's folder holds."""
    words = ("title", "licence", "note")  # a reworded note is no reason to fetch again
    text = json.dumps([FORMAT, {k: v for k, v in plain(sample).items() if k not in words}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_rows(path: Path, rows_: list[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows_:
            try:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            except UnicodeEncodeError as error:
                raise DataError(f"{path.name}: a row holds half a character: {row!r}.") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

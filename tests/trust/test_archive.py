"""Our own extractor: honest archives come out whole; refused ones leave nothing."""

import os
import random
import tarfile
import zipfile
from pathlib import Path

import pytest

from luthier.core import BadInput, DiskFull, LuthierError, Refused
from luthier.trust import Limits, archive

FILES = {"a.txt": b"alpha", "deep/er/b.bin": bytes(range(256)) * 40, "deep/empty": b"", "ünï 🙂.txt": b"x" * 3000}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def honest(folder: Path, kind: str) -> Path:
    source = folder / "source"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    path = folder / f"a.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
            for name in FILES:
                out.write(source / name, name)
    else:
        mode, form = kind.split("-")
        with tarfile.open(path, mode, format=getattr(tarfile, form)) as out:  # type: ignore[call-overload]
            out.add(source, ".")
            out.add(source / "a.txt", "long/" + "n" * 120)
    return path


KINDS = ["zip", "w:-PAX_FORMAT", "w:-GNU_FORMAT", "w:gz-PAX_FORMAT", "w:bz2-GNU_FORMAT", "w:xz-PAX_FORMAT"]


@pytest.mark.parametrize("kind", KINDS)
def test_an_honest_archive_comes_out_whole(tmp_path: Path, kind: str) -> None:
    written = archive.extract(honest(tmp_path, kind), tmp_path / "out")
    expected = dict(FILES) if kind == "zip" else {**FILES, "long/" + "n" * 120: b"alpha"}
    assert tree(tmp_path / "out") == expected
    assert {str(p.relative_to(tmp_path / "out")) for p in written} == set(expected)


@pytest.mark.parametrize("kind", ["zip", "w:gz-PAX_FORMAT"])
def test_only_the_members_asked_for_are_unpacked(tmp_path: Path, kind: str) -> None:
    path = honest(tmp_path, kind)
    archive.extract(path, tmp_path / "out", ["deep/er/b.bin"])
    assert tree(tmp_path / "out") == {"deep/er/b.bin": FILES["deep/er/b.bin"]}
    with pytest.raises(BadInput, match=r"holds no member 'b.txt'.*Did you mean 'a.txt'"):
        archive.extract(path, tmp_path / "other", ["b.txt"])
    assert not (tmp_path / "other").exists()


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(BadInput, match="not an empty folder"):
        archive.extract(honest(tmp_path, "zip"), tmp_path / "out")
    assert tree(tmp_path / "out") == {"mine": b"x"}


def test_a_target_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BadInput):
        archive.extract(honest(tmp_path, "zip"), tmp_path / "out")


def test_the_caps_are_those_of_the_limits_object(tmp_path: Path) -> None:
    path = honest(tmp_path, "zip")
    with pytest.raises(Refused, match="claims 4 members"):
        archive.extract(path, tmp_path / "out", limits=Limits(members=3))
    with pytest.raises(Refused, match="a bomb"):
        archive.extract(path, tmp_path / "out", limits=Limits(unpacked_bytes=1000))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = honest(tmp_path, "zip")
    before = set(tmp_path.iterdir())
    kept = os.open

    def full(name: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_CREAT and "b.bin" in str(name):
            raise OSError(28, "No space left on device")
        return kept(name, flags, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(DiskFull):
        archive.extract(path, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", ["zip", "w:-PAX_FORMAT", "w:gz-GNU_FORMAT", "w:xz-PAX_FORMAT"])
def test_a_damaged_archive_is_unpacked_or_refused_but_never_crashes(tmp_path: Path, kind: str) -> None:
    content, draw = honest(tmp_path, kind).read_bytes(), random.Random(0)
    path = tmp_path / "bad"
    for number in range(120):
        changed = bytearray(content)
        for _ in range(draw.randint(1, 5)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        if draw.random() < 0.2:
            del changed[draw.randrange(len(changed)) :]
        path.write_bytes(changed)
        target = tmp_path / f"out{number}"
        try:
            archive.extract(path, target)
        except LuthierError:
            assert not target.exists()
    assert not list(tmp_path.glob(".unpack-*"))

import io
import stat
import tarfile
import warnings
import zipfile
from pathlib import Path

import pytest

import luthier.samples.download as downloading
from luthier.core import IntegrityError
from luthier.samples.download import take_members


def zipped(path: Path, *entries: tuple[str, bytes, int]) -> Path:
    """Write a zip file of (name, content, Unix mode)."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data, mode in entries:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # zipfile warns of the double name that a test wants
                archive.writestr(info, data, zipfile.ZIP_DEFLATED)
    return path


def test_only_named_members_are_taken_under_names_of_ours(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("x/one", b"1", 0o100644), ("x/two", b"2", 0), ("../three", b"3", 0))
    taken = take_members(archive, ["x/two", "x/four"], tmp_path / "out")
    assert {name: path.read_bytes() for name, path in taken.items()} == {"x/two": b"2"}
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["member-000"]


@pytest.mark.parametrize("name", ["../up.txt", "/etc/passwd", "a/../../b", "..\\up", "a\\..\\..\\b"])
def test_a_member_that_climbs_out_is_refused(tmp_path: Path, name: str) -> None:
    archive = zipped(tmp_path / "a.zip", (name, b"x", 0o100644))
    with pytest.raises(IntegrityError, match="climbs out"):
        take_members(archive, [name], tmp_path / "out")


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644, stat.S_IFCHR | 0o644])
def test_a_member_that_is_no_plain_file_is_refused(tmp_path: Path, mode: int) -> None:
    archive = zipped(tmp_path / "a.zip", ("link", b"/etc/passwd", mode))
    with pytest.raises(IntegrityError, match="not a file"):
        take_members(archive, ["link"], tmp_path / "out")


def test_a_member_named_twice_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("one", b"1", 0), ("one", b"2", 0))
    with pytest.raises(IntegrityError, match="2 members called 'one'"):
        take_members(archive, ["one"], tmp_path / "out")


def test_a_member_larger_than_the_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "MEMBER_CAP", 1000)
    archive = zipped(tmp_path / "a.zip", ("big", bytes(1001), 0))
    with pytest.raises(IntegrityError, match="declares 1,001 bytes"):
        take_members(archive, ["big"], tmp_path / "out")


def test_a_member_that_unpacks_to_another_size_than_declared_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", ("big", bytes(5000), 0))
    data = archive.read_bytes()
    honest = (5000).to_bytes(4, "little")
    assert data.count(honest) == 2  # in the local header and in the directory
    archive.write_bytes(data.replace(honest, (50).to_bytes(4, "little")))
    with pytest.raises(IntegrityError):
        take_members(archive, ["big"], tmp_path / "out")


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    for name in ("a.whl", "a.tar.gz"):
        (tmp_path / name).write_bytes(b"<html>not found</html>")
        with pytest.raises(IntegrityError, match="cannot be read as an archive"):
            take_members(tmp_path / name, ["x"], tmp_path / "out")


def test_a_link_in_a_source_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("a/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        plain = tarfile.TarInfo("a/plain")
        plain.size = 2
        archive.addfile(plain, io.BytesIO(b"ok"))
    assert take_members(path, ["a/plain"], tmp_path / "out")["a/plain"].read_bytes() == b"ok"
    with pytest.raises(IntegrityError, match="not a file"):
        take_members(path, ["a/link"], tmp_path / "out2")

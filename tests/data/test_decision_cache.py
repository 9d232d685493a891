"""Kept decisions about rows: they are what looking at each row gives, and anything that matters makes others."""

import importlib
import json
from dataclasses import replace

import pytest

from luthier.core import DataError
from luthier.data import decision_cache as decided
from luthier.data import load_data as deciding
from luthier.data.load_data import load_data
from luthier.kernels import plain
from luthier.runs.spec import DataSpec

N = decided.CACHED_FROM + 10


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LUTHIER_ENCODED_GIB", raising=False)


def _write(path, n=N, first=0):
    rows = [{"text": f"Row {i - i % 7 // 6}", "label": "abc"[i % 3]} for i in range(first, first + n)]
    if path.suffix == ".csv":
        path.write_text("text,label\n" + "".join(f"{r['text']},{r['label']}\n" for r in rows))
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


def _same(one, other):
    assert one == other
    assert one.fingerprint() == other.fingerprint()
    assert [half.is_plain() for half in (one.train, one.test) if half] == [
        half.is_plain() for half in (other.train, other.test) if half
    ]


def _entries(tmp_path):
    root = tmp_path / "cache" / "encoded"
    return sorted(root.iterdir()) if root.is_dir() else []


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
@pytest.mark.parametrize("kind", ["split", "no test", "own test", "told"])
def test_kept_decisions_are_those_of_looking_at_each_row(kind, ending, tmp_path, monkeypatch):
    source = _write(tmp_path / f"rows.{ending}")
    spec = {
        "split": DataSpec(source=source, split_seed=3),
        "no test": DataSpec(source=source, test_share=0),
        "own test": DataSpec(source=source, test=_write(tmp_path / f"test.{ending}", 50, N - 20)),
        "told": DataSpec(source=source, text="text", label="label"),
    }[kind]
    with plain():
        anew = load_data(spec)
    assert _entries(tmp_path) == []
    first = load_data(spec)
    assert len(_entries(tmp_path)) == 1
    for name in ("find_columns", "infer_task", "count_duplicates", "hold_out"):
        monkeypatch.setattr(deciding, name, None)  # nothing is looked at the second time
    second = load_data(spec)
    _same(anew, first)
    _same(anew, second)
    assert anew.duplicates.in_train > 0


def test_a_known_fingerprint_is_not_computed_again(tmp_path, monkeypatch):
    spec = DataSpec(source=_write(tmp_path / "rows.jsonl"))
    first = load_data(spec).fingerprint()
    again = load_data(spec)
    monkeypatch.setattr("luthier.data.rows.hashlib", None)
    assert again.fingerprint() == first


def test_other_bytes_another_spec_or_another_model_are_decided_anew(tmp_path):
    source = _write(tmp_path / "rows.jsonl")
    load_data(DataSpec(source=source))
    load_data(DataSpec(source=source, split_seed=1))
    load_data(DataSpec(source=source), model_config="another")
    assert len(_entries(tmp_path)) == 3
    before = load_data(DataSpec(source=source))
    with (tmp_path / "rows.jsonl").open("a") as out:
        out.write('{"text": "one more", "label": "d"}\n')
    after = load_data(DataSpec(source=source))
    assert len(_entries(tmp_path)) == 4
    assert after.task.labels == ("a", "b", "c", "d") and before.task.labels == ("a", "b", "c")


def test_one_byte_of_the_test_rows_is_enough(tmp_path):
    source, test = _write(tmp_path / "rows.jsonl"), tmp_path / "test.jsonl"
    _write(test, 20, 10**6)
    before = load_data(DataSpec(source=source, test=str(test)))
    test.write_text(test.read_text().replace("Row 1000001", "Row 1"))
    after = load_data(DataSpec(source=source, test=str(test)))
    assert before.duplicates.across == 0 and after.duplicates.across == 1


def test_leakage_is_refused_from_what_is_kept_too(tmp_path):
    source = _write(tmp_path / "rows.jsonl")
    spec = DataSpec(source=source, test=source, strict=True)
    for _ in range(2):
        with pytest.raises(DataError, match="also stand in the training half"):
            load_data(spec)
    assert len(_entries(tmp_path)) == 1


@pytest.mark.parametrize("file", ["kept.safetensors", "kept.json", "MANIFEST.json"])
def test_a_damaged_entry_is_decided_anew(file, tmp_path):
    spec = DataSpec(source=_write(tmp_path / "rows.jsonl"))
    first = load_data(spec)
    (entry,) = _entries(tmp_path)
    (entry / file).write_bytes(b"{}")
    second = load_data(spec)
    assert str(entry) in second.notes[-1] and "damaged" in second.notes[-1]
    _same(replace(second, notes=second.notes[:-1]), first)
    assert _entries(tmp_path) == [entry]
    _same(load_data(spec), first)


def test_few_rows_and_files_without_a_digest_are_looked_at_each_time(tmp_path):
    load_data(DataSpec(source=_write(tmp_path / "few.jsonl", 100)))
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {"text": [f"Row {i}" for i in range(N)], "label": ["ab"[i % 2] for i in range(N)]}
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    load_data(DataSpec(source=str(tmp_path / "rows.parquet")))
    assert _entries(tmp_path) == []


def test_a_folder_of_texts_is_known_by_names_and_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(decided, "CACHED_FROM", 10)
    for label in ("good", "bad"):
        (tmp_path / "texts" / label).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "texts" / label / f"{i}.txt").write_text(f"{label} {i}")
    spec = DataSpec(source=str(tmp_path / "texts"))
    load_data(spec)
    (tmp_path / "texts" / "good" / "3.txt").rename(tmp_path / "texts" / "bad" / "33.txt")
    load_data(spec)
    assert len(_entries(tmp_path)) == 2
    with plain():
        anew = load_data(spec)
    _same(load_data(spec), anew)


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "file"))
    spec = DataSpec(source=_write(tmp_path / "rows.jsonl"))
    found = load_data(spec)
    assert "could not be kept" in found.notes[-1]
    _same(load_data(spec), found)


@pytest.mark.parametrize("module", ["load_data", "columns", "rows", "tasks", "decision_cache"])
def test_other_code_decides_anew(module, tmp_path, monkeypatch):
    spec = DataSpec(source=_write(tmp_path / "rows.jsonl"))
    load_data(spec)
    changed = tmp_path / "changed.py"
    changed.write_text("# another version")
    monkeypatch.setattr(importlib.import_module(f"luthier.data.{module}"), "__file__", str(changed))
    load_data(spec)
    assert len(_entries(tmp_path)) == 2

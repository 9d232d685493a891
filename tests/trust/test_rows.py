"""Rows: strict, with file and line."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.core import BadInput, DataError, Refused
from luthier.trust import Limits, row_files


def put(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_jsonl_rows_know_their_lines(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        "a.jsonl",
        b'\xef\xbb\xbf{"text": "a\xc3\xa9", "n": 1}\r\n{"text": "x\\ud83d\\ude00", "n": -2}\r\n\r\n',
    )
    found = row_files.read(path)
    assert found.rows == [{"text": "aé", "n": 1}, {"text": "x😀", "n": -2}]
    assert found.places == [f"{path}:1", f"{path}:2"] and found.columns() == ["text", "n"] and len(found) == 2


def test_csv_rows_know_their_lines_even_behind_quoted_line_breaks(tmp_path: Path) -> None:
    path = put(tmp_path, "a.csv", '\ufefftext,label\r\n"two\r\nlines, and ""quotes""",x\r\nb,y\r\n\r\n')
    found = row_files.read(path)
    assert found.rows == [{"text": 'two\r\nlines, and "quotes"', "label": "x"}, {"text": "b", "label": "y"}]
    assert found.places == [f"{path}:2", f"{path}:4"]
    tabs = put(tmp_path, "a.tsv", 'a\tb "quoted" c\n')
    assert row_files.read(tabs, header=["x", "y"]).rows == [{"x": "a", "y": 'b "quoted" c'}]


def test_parquet_rows_come_back_with_their_types(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "n": [1, 2], "m": [[{"role": "user"}], []], "x": [0.5, None]})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    assert row_files.read(path).rows == table.to_pylist()
    with pytest.raises(DataError, match=r"no column 'txt'.* Did you mean 'text'"):
        row_files.read(path, require=["txt"])
    with pytest.raises(Refused, match="over the caps"):
        row_files.read(path, limits=Limits(rows=1))
    dates = tmp_path / "d.parquet"
    pq.write_table(pa.table({"d": pa.array([0], pa.date32())}), dates)
    with pytest.raises(DataError, match=r"d\.parquet:1: column 'd' holds a date"):
        row_files.read(dates)


def test_damaged_parquet_is_read_or_refused(tmp_path: Path) -> None:
    import random

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(50)]}), path)
    content, draw = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(60):
        changed = bytearray(content)
        changed[draw.randrange(4, len(changed) - 4)] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        try:
            row_files.read(path)
        except (DataError, Refused):
            refused += 1
    assert refused > 0


def test_a_folder_of_texts_is_rows_with_labels(tmp_path: Path) -> None:
    put(tmp_path, "d/neg/1.txt", "bad film")
    put(tmp_path, "d/pos/2.txt", "good film")
    assert row_files.read(tmp_path / "d").rows == [
        {"text": "bad film", "label": "neg"},
        {"text": "good film", "label": "pos"},
    ]
    put(tmp_path, "d/pos/notes.md", "x")
    with pytest.raises(DataError, match=r"notes\.md:1: not a \.txt file"):
        row_files.read(tmp_path / "d")
    put(tmp_path, "flat/1.txt", "one")
    assert row_files.read(tmp_path / "flat").rows == [{"text": "one"}]
    (tmp_path / "flat" / "2.txt").symlink_to("/etc/passwd")
    with pytest.raises(Refused, match="a link"):
        row_files.read(tmp_path / "flat")


def test_all_bad_lines_are_named_at_once_up_to_fifty(tmp_path: Path) -> None:
    lines = ['{"text": "ok", "n": 1}'] + [f'{{"text": {n}' for n in range(70)]
    with pytest.raises(DataError) as error:
        row_files.read(put(tmp_path, "a.jsonl", "\n".join(lines)))
    text = str(error.value)
    assert "70 bad rows" in text and "a.jsonl:2: not JSON" in text and "a.jsonl:51: not JSON" in text
    assert "a.jsonl:52:" not in text and "and 20 more" in text


def test_each_kind_of_bad_line_is_told_apart(tmp_path: Path) -> None:
    good = '{"text": "ok", "n": 1}'
    bad = {
        '{"text": "x"}': "lacks column 'n'",
        '{"text": "x", "n": 1, "m": 2}': "has an unknown column 'm'",
        '{"text": "x", "n": "1"}': "column 'n' must be int, got '1' (str)",
        '{"text": "x", "n": true}': "column 'n' must be int, got 'True' (bool)",
        '{"text": "  ", "n": 1}': "column 'text' is empty",
        '{"text": "\\ud800", "n": 1}': "half of a surrogate pair",
        '{"text": "x", "n": NaN}': "NaN is no number",
        '{"text": "x", "n": 1, "n": 2}': "the key 'n' stands twice",
        '["x"]': "must be an object",
    }
    with pytest.raises(DataError) as error:
        row_files.read(put(tmp_path, "a.jsonl", "\n".join([good, *bad])), require=["text"], types={"n": int})
    for number, reason in enumerate(bad.values(), 2):
        assert any(f"a.jsonl:{number}: " in line and reason in line for line in str(error.value).split("\n")), reason


def test_a_ragged_csv_row_names_expected_and_found_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.csv:3: expected 2 columns \('text, label'\), got 3"):
        row_files.read(put(tmp_path, "a.csv", "text,label\na,b\na,b,c\n"))


def test_another_encoding_is_named_with_the_byte(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"byte 15 \(line 2\) is not UTF-8.*iconv"):
        row_files.read(put(tmp_path, "a.csv", b"text,label\ncafe\xe9,b\n"))


def test_rows_are_left_out_only_within_a_budget_and_listed(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"a": 1}\nx\n{"a": 2}\ny\n')
    found = row_files.read(path, skip_bad=2)
    assert [r["a"] for r in found.rows] == [1, 2] and found.places == [f"{path}:1", f"{path}:3"]
    assert len(found.left_out) == 2 and "a.jsonl:2: not JSON" in found.left_out[0]
    with pytest.raises(DataError, match=r"2 bad rows \(1 may be left out\)"):
        row_files.read(path, skip_bad=1)


def test_duplicates_are_counted_not_dropped(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": 1}\n')
    found = row_files.read(path)
    assert len(found) == 3 and found.duplicates() == [(f"{path}:3", f"{path}:1")]


def test_a_missing_file_names_near_files_and_a_wrong_kind_says_which_are_read(tmp_path: Path) -> None:
    put(tmp_path, "train.jsonl", '{"a": 1}\n')
    with pytest.raises(BadInput, match=r"Did you mean 'train\.jsonl'"):
        row_files.read(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"not from '\.ods'"):
        row_files.read(put(tmp_path, "a.ods", "x"))


def test_a_unicode_line_separator_inside_a_text_does_not_split_the_row(tmp_path: Path) -> None:
    assert row_files.read(put(tmp_path, "a.jsonl", '{"a": "x\u2028y\x85z"}\n')).rows == [{"a": "x\u2028y\x85z"}]


def test_a_long_csv_field_is_read_and_the_limit_of_the_library_is_put_back(tmp_path: Path) -> None:
    import csv

    before = csv.field_size_limit()
    assert len(row_files.read(put(tmp_path, "a.csv", "text\n" + "x" * 200_000)).rows[0]["text"]) == 200_000
    assert csv.field_size_limit() == before

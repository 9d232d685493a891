"""Bad data, from the file on: each message names the value, its place, and what to do; nothing is written."""

import json

import pytest

from luthier.core import BadInput, DataError
from luthier.data.load_data import load_data, load_inputs
from luthier.runs.spec import DataSpec

GOOD = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refused(folder, task="auto", **spec):
    """The message with which the data are refused; nothing in the folder may change."""
    before = contents(folder)
    with pytest.raises(BadInput) as caught:
        load_data(DataSpec(**{k: str(folder / v) if k in ("source", "test") else v for k, v in spec.items()}), task)
    assert contents(folder) == before
    return str(caught.value)


def assert_says(message, *words):
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.fault("F26", "in training data")
@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("empty.csv", b"", ["empty.csv"]),
        ("header.csv", b"text,label\n", ["header.csv", "no rows"]),
        ("ragged.csv", b"text,label\na,b\nc,d,e\n", ["ragged.csv:3", "3"]),
        ("short.csv", b"text,label\na,b\nc\n", ["short.csv:3", "got 1"]),
        ("twice.csv", b"text,label,text\na,b,c\n", ["twice.csv", ":1: two columns are called 'text'", "Rename"]),
        ("greek.csv", "text,label\nκαφές και τσάι,b\n".encode("iso8859-7"), ["greek.csv", "line 2", "--encoding"]),
        ("nul.csv", b"text,label\na\x00,b\nc,d\n", ["nul.csv", "line 2", "NUL"]),
        ("bad.jsonl", b'{"text": "a", "label": "x"}\n{"text": "b", label: 1}\n', ["bad.jsonl:2"]),
        ("list.jsonl", b'["a", "x"]\n', ["list.jsonl:1"]),
        ("empty.jsonl", b"", ["empty.jsonl"]),
        ("not.parquet", b"PAR0", ["not.parquet"]),
        ("rows.xlsx", b"x", ["rows.xlsx"]),
        ("rows.ods", b"x", ["rows.ods", ".csv", ".jsonl", ".xlsx"]),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, name, raw, words):
    (tmp_path / name).write_bytes(raw)
    assert_says(refused(tmp_path, source=name), *words)


def test_all_bad_lines_of_a_file_are_named_together(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "a", "label": "x"}\n{oops\n{"text": "b"\n', encoding="utf-8")
    assert_says(refused(tmp_path, source="bad.jsonl"), "bad.jsonl:2", "bad.jsonl:3")


def test_a_missing_file_is_named_with_near_ones(tmp_path):
    (tmp_path / "train.csv").write_text(GOOD, encoding="utf-8")
    assert_says(refused(tmp_path, source="trian.csv"), "trian.csv", "no such file", "'train.csv'")
    assert_says(refused(tmp_path, source="train.csv", test="tset.csv"), "tset.csv", "no such file")


def test_an_empty_folder_has_no_texts(tmp_path):
    (tmp_path / "texts").mkdir()
    assert_says(refused(tmp_path, source="texts"), "texts", "holds no rows", "at least one")


@pytest.mark.fault("F27", "in training data")
def test_a_missing_column_is_answered_with_the_columns_there_are(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    assert_says(refused(tmp_path, source="a.csv", label="labl"), "'labl'", "'label'", "--label", "a.csv")
    (tmp_path / "b.csv").write_text("foo,bar\n1,2\n", encoding="utf-8")
    assert_says(refused(tmp_path, source="b.csv"), "'foo', 'bar'", "--text and --label")


@pytest.mark.fault("F30", "unknown label")
def test_labels_in_test_that_train_lacks_are_named(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    (tmp_path / "t.csv").write_text("text,label\nnew,a\nother,c\n", encoding="utf-8")
    assert_says(refused(tmp_path, source="a.csv", test="t.csv"), "t.csv:3", "'c'", "(a, b)")


def test_one_class_only_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,a\ny,a\n", encoding="utf-8")
    assert_says(refused(tmp_path, source="a.csv"), "'a'", "nothing to learn", "a.csv")


def test_a_measure_that_is_no_number_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\nx,1.5\ny,many\n", encoding="utf-8")
    assert_says(refused(tmp_path, task="regression", source="a.csv"), "a.csv:3", "'many'")


@pytest.mark.fault("F33", "counted, and strict stops")
def test_rows_in_both_halves_are_counted_and_strict_stops(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    (tmp_path / "t.csv").write_text("text,label\nTEXT  3,b\nnew,a\n", encoding="utf-8")
    data = load_data(DataSpec(source=str(tmp_path / "a.csv"), test=str(tmp_path / "t.csv")))
    assert data.duplicates.across == 1
    assert any("1 of test also in train" in note for note in data.notes)
    message = refused(tmp_path, source="a.csv", test="t.csv", strict=True)
    assert_says(message, "1 rows of the test half", "t.csv:2", "a.csv:5", "--strict")


def test_good_rows_give_a_split_a_task_and_every_decision_in_words(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    data = load_data(DataSpec(source=str(tmp_path / "a.csv")))
    assert (len(data.train), len(data.test), data.task.labels) == (16, 4, ("a", "b"))
    assert [r["label"] for r in data.test.rows].count("a") == 2
    said = " / ".join(data.notes)
    assert_says(said, "text = 'text'", "label = 'label'", "held out 4 of 20", "2 classes", "duplicates: 0 in train")
    again = load_data(DataSpec(source=str(tmp_path / "a.csv")))
    assert again.fingerprint() == data.fingerprint()
    (tmp_path / "a.csv").write_text(GOOD.replace("text 7", "text seven"), encoding="utf-8")
    assert load_data(DataSpec(source=str(tmp_path / "a.csv"))).fingerprint() != data.fingerprint()


def test_measures_and_several_labels_are_split_without_classes(tmp_path):
    rows = [{"text": f"t{i}", "label": i + 0.5} for i in range(10)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = load_data(DataSpec(source=str(tmp_path / "m.jsonl")))
    assert (data.task.name, len(data.test)) == ("regression", 2)
    rows = [{"text": f"t{i}", "label": ["a", "b"][: 1 + i % 2]} for i in range(10)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    data = load_data(DataSpec(source=str(tmp_path / "s.jsonl")))
    assert (data.task.multi_label, len(data.test)) == (True, 2)


def test_no_test_half_is_a_choice(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    data = load_data(DataSpec(source=str(tmp_path / "a.csv"), test_share=0))
    assert (len(data.train), data.test) == (20, None)


def test_rows_of_standard_input_cannot_be_learnt_from():
    with pytest.raises(DataError, match=r"^-: rows of standard input can be answered.*Write them to a file"):
        load_data(DataSpec(source="-"))


def test_rows_to_predict_need_their_inputs_and_no_labels(tmp_path):
    (tmp_path / "a.csv").write_text(GOOD, encoding="utf-8")
    columns = load_data(DataSpec(source=str(tmp_path / "a.csv"))).columns
    (tmp_path / "p.csv").write_text("text\nwhy\n", encoding="utf-8")
    table, kept = load_inputs(str(tmp_path / "p.csv"), columns)
    assert (len(table), kept.text, kept.label) == (1, "text", None)
    assert load_inputs(str(tmp_path / "a.csv"), columns)[1].label == "label"
    (tmp_path / "q.csv").write_text("sentence\nwhy\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"q\.csv: no column 'text'.*Its columns are 'sentence'"):
        load_inputs(str(tmp_path / "q.csv"), columns)

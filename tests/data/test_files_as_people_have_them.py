"""Files as spreadsheets, exports and colleagues save them: read, said in one line, and named where a guess is wrong."""

import gzip
import json

import pytest

from luthier.core import BadInput, DataError
from luthier.data.load_data import load_data
from luthier.runs.spec import DataSpec

GOOD = [
    "lovely quiet room",
    "the soup was superb",
    "friendly staff again",
    "warm bread, butter",
    "happy with it",
    "so clean",
]
BAD = [
    "noisy and dirty room",
    "the soup was cold",
    "rude staff again",
    "stale bread",
    "sad with it",
    "a dark damp flat",
]
ROWS = [
    (text, label) for pair in zip(GOOD, BAD, strict=True) for text, label in zip(pair, ("good", "bad"), strict=True)
]


def loaded(path, **flags):
    return load_data(DataSpec(source=str(path), **{"test_share": 0.34, **flags}))


def rows_of(data):
    return [*data.train.rows, *data.test.rows]


def written(folder, name, lines, encoding="utf-8", end="\n"):
    path = folder / name
    path.write_bytes((end.join(lines) + end).encode(encoding) if isinstance(lines, list) else lines)
    return path


def quoted(delimiter, rows=ROWS, header=("text", "label")):
    def cell(value):
        return f'"{value}"' if delimiter in value else value

    return [delimiter.join(map(cell, row)) for row in (header, *rows)]


# --- how it is written


@pytest.mark.parametrize(
    ("name", "delimiter", "encoding", "said"),
    [
        ("excel.csv", ";", "utf-8-sig", "columns are parted by semicolons"),
        ("german.csv", ";", "cp1252", "read as cp1252"),
        ("tabs.csv", "\t", "utf-16", "read as UTF-16"),
        ("wide.csv", ",", "utf-32", "read as UTF-32"),
        ("bars.csv", "|", "utf-8", "columns are parted by bars"),
        ("UPPER.TSV", "\t", "utf-8", ""),
        ("plain.csv", ",", "utf-8", ""),
    ],
)
def test_a_dialect_is_recognised_and_said(name, delimiter, encoding, said, tmp_path):
    rows = [(text.replace("soup", "Suppe für zwölf"), label) for text, label in ROWS]
    data = loaded(written(tmp_path, name, quoted(delimiter, rows), encoding, "\r\n"))
    assert sorted((r["text"], r["label"]) for r in rows_of(data)) == sorted(rows)
    read_as = [n for n in data.notes if n.startswith(name)]
    assert any(said in n for n in read_as) if said else not read_as


def test_a_guess_is_overruled_by_naming_it(tmp_path):
    path = written(tmp_path, "a.csv", [line.replace("soup", "s\u03bfup") for line in quoted(";")], "iso8859-7")
    assert any("sουp"[1] in r["text"] for r in rows_of(loaded(path, encoding="iso8859-7", delimiter=";")))
    with pytest.raises(BadInput, match=r"encoding 'klingon'.*utf-8"):
        loaded(path, encoding="klingon")
    with pytest.raises(BadInput, match="give one character"):
        loaded(path, encoding="iso8859-7", delimiter=";;")
    with pytest.raises(BadInput, match=r"--delimiter is for \.csv"):
        loaded(written(tmp_path, "a.jsonl", [json.dumps({"text": t, "label": c}) for t, c in ROWS]), delimiter=";")


def test_bytes_that_nothing_explains_are_refused_with_the_option_to_name_them(tmp_path):
    path = written(tmp_path, "a.csv", ["text,label", *(f"{'щука ' * 5},{c}" for _, c in ROWS)], "koi8-r")
    with pytest.raises(DataError, match=r"a\.csv.*line 2.*is not UTF-8.*--encoding"):
        loaded(path)


def test_a_comma_inside_one_column_is_no_delimiter(tmp_path):
    data = load_data(DataSpec(source=str(written(tmp_path, "a.csv", ["text", *(t.replace(",", "") for t in GOOD)]))))
    assert data.columns.text == "text" and len(rows_of(data)) == len(GOOD)


def test_a_quote_that_is_none_swallows_no_line_of_a_file_of_tabs(tmp_path):
    rows = [(f'"so-called {t}' if i in (2, 7) else t, c) for i, (t, c) in enumerate(ROWS)]
    data = loaded(written(tmp_path, "q.tsv", ["\t".join(r) for r in (("text", "label"), *rows)]))
    assert sorted((r["text"], r["label"]) for r in rows_of(data)) == sorted(rows)
    assert any("quotes are read as they stand" in n for n in data.notes)


def test_headers_are_trimmed_and_columns_without_a_name_are_nobody_s(tmp_path):
    data = loaded(written(tmp_path, "a.csv", [" text , label,,", *(f'"{t}",{c},,' for t, c in ROWS)]))
    assert (data.columns.text, data.columns.label) == ("text", "label")
    assert loaded(written(tmp_path, "b.csv", [",text,label", *(f'{i},"{t}",{c}' for i, (t, c) in enumerate(ROWS))]))


def test_json_lists_lines_of_that_name_and_packed_files_are_read(tmp_path):
    objects = [{"text": t, "label": c} for t, c in ROWS]
    lines = [json.dumps(o) for o in objects]
    as_list = written(tmp_path, "a.json", json.dumps(objects).encode())
    as_lines = written(tmp_path, "b.json", lines)
    packed = written(tmp_path, "c.csv.gz", gzip.compress("\n".join(quoted(",")).encode()))
    for path in (as_list, as_lines, packed):
        assert sorted((r["text"], r["label"]) for r in rows_of(loaded(path))) == sorted(ROWS)
    with pytest.raises(DataError, match=r"a\.json'?:1: not JSON"):
        loaded(written(tmp_path, "a.json", b'[{"text": "a", }]'))
    with pytest.raises(DataError, match=r"must be an object"):
        loaded(written(tmp_path, "a.json", b'[["a", "b"]]'))
    with pytest.raises(DataError, match="cannot be unpacked"):
        loaded(written(tmp_path, "d.csv.gz", b"\x1f\x8b" + b"x" * 30))


def test_a_sheet_is_read_and_other_sheets_are_named(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    for row in (("text", "label"), *ROWS):
        book.active.append(row)
    book.create_sheet("notes")
    book.save(tmp_path / "a.xlsx")
    data = loaded(tmp_path / "a.xlsx")
    assert sorted((r["text"], r["label"]) for r in rows_of(data)) == sorted(ROWS)
    assert any("'notes'" in n for n in data.notes)


def test_what_nobody_reads_is_not_judged(tmp_path):
    lines = [
        json.dumps({"text": t, "label": c, "price": float("nan")} | ({"note": 1} if i % 3 else {}))
        for i, (t, c) in enumerate(ROWS)
    ]
    assert len(rows_of(loaded(written(tmp_path, "a.jsonl", lines)))) == len(ROWS)


def test_dates_in_columns_that_nobody_reads_do_no_harm(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import datetime

    import pyarrow.parquet as pq

    day = datetime.datetime(2026, 1, 2, 3, 4)
    table = {"text": [t for t, _ in ROWS], "label": [c for _, c in ROWS], "when": [day] * len(ROWS)}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    assert rows_of(loaded(tmp_path / "a.parquet"))[0]["when"] == "2026-01-02T03:04:00"


def test_files_that_a_system_leaves_are_no_texts(tmp_path):
    for name, texts in (("good", GOOD), ("bad", BAD)):
        (tmp_path / "d" / name).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "d" / name / f"{i}.txt").write_text(text)
    (tmp_path / "d" / ".DS_Store").write_bytes(b"\0\0")
    (tmp_path / "d" / "good" / "Thumbs.db").write_bytes(b"\0")
    assert len(rows_of(loaded(tmp_path / "d"))) == len(ROWS)


# --- labels


@pytest.mark.parametrize(
    ("train", "test", "labels"),
    [
        ((1.0, 0.0), ("1", "0"), ("0", "1")),
        (("1.0", "0"), ("1", "0.0"), ("0", "1")),
        ((True, False), ("True", "FALSE"), ("false", "true")),
        (("Yes", " no "), ("Yes", "no"), ("Yes", "no")),
    ],
)
def test_the_same_value_is_the_same_label_in_both_halves(train, test, labels, tmp_path):
    for name, values in (("train", train), ("test", test)):
        lines = [json.dumps({"text": f"{t} {name}", "label": values[i % 2]}) for i, (t, _) in enumerate(ROWS)]
        written(tmp_path, f"{name}.jsonl", lines)
    data = loaded(tmp_path / "train.jsonl", test=str(tmp_path / "test.jsonl"))
    assert data.task.labels == labels
    assert (
        data.task.targets(data.test, data.columns).tolist()[:2]
        == data.task.targets(data.train, data.columns).tolist()[:2]
    )


def test_labels_that_look_alike_are_named_with_their_counts(tmp_path):
    many = [(f"{t} {i}", c) for i in range(20) for t, c in ROWS]
    many = [(t, "delivery" if c == "good" else "refund") for t, c in many] + [
        ("where is it", "Delivery"),
        ("come on", "delivry"),
    ]
    data = loaded(written(tmp_path, "a.csv", quoted(",", many)))
    (note,) = [n for n in data.notes if "look alike" in n]
    assert "'delivery' 120, 'Delivery' 1" in note and "'delivry' 1" in note
    assert any("rows of each class: delivery 1" in n for n in data.notes)


def test_lists_as_python_prints_them_are_lists_and_nothing_is_evaluated(tmp_path):
    rows = [(t, "['warm', 'kind']" if c == "good" else "['cold']") for t, c in ROWS]
    data = loaded(written(tmp_path, "a.csv", quoted(",", rows)))
    assert data.task.multi_label and data.task.labels == ("cold", "kind", "warm")
    rows = [(t, "[__import__('os').getcwd()]") for t, _ in ROWS[:1]] + ROWS[1:]
    assert "[__import__('os').getcwd()]" in loaded(written(tmp_path, "b.csv", quoted(",", rows))).task.labels
    words = [(str(t.split()), str(["O"] * len(t.split()))) for t, _ in ROWS[:-1]] + [("['a', 'b']", "['B-X', 'O']")]
    data = loaded(written(tmp_path, "c.csv", quoted(",", words, ("tokens", "ner_tags"))), test_share=0)
    assert data.task.labels == ("B-X", "O")


def test_one_mark_for_each_label_is_several_labels(tmp_path):
    lines = [json.dumps({"text": t, "labels": [1, 0, 0] if c == "good" else [0, 1, 1]}) for t, c in ROWS]
    data = loaded(written(tmp_path, "a.jsonl", lines), test_share=0)
    assert data.task.multi_label and data.task.labels == ("0", "1", "2")
    assert data.task.targets(data.train, data.columns)[:2].tolist() == [[1, 0, 0], [0, 1, 1]]
    lines = [json.dumps({"text": t, "labels": [1, 1]}) for t, _ in ROWS]
    with pytest.raises(DataError, match="every row has every label"):
        loaded(written(tmp_path, "b.jsonl", lines), test_share=0)


def test_columns_of_marks_are_offered_and_taken_together(tmp_path):
    rows = [(t, str(int(c == "bad")), "1" if i % 3 else "0", "0" if i % 4 else "1") for i, (t, c) in enumerate(ROWS)]
    path = written(tmp_path, "a.csv", quoted(",", rows, ("comment_text", "toxic", "threat", "insult")))
    with pytest.raises(DataError, match=r"--text comment_text --label toxic,threat,insult"):
        loaded(path)
    data = loaded(path, text="comment_text", label="toxic,threat,insult", test_share=0)
    assert data.task.multi_label and data.task.labels == ("insult", "threat", "toxic")
    rows[3] = (rows[3][0], "1", "perhaps", "0")
    path = written(tmp_path, "b.csv", quoted(",", rows, ("comment_text", "toxic", "threat", "insult")))
    with pytest.raises(DataError, match=r"b\.csv:5: field 'threat' is 'perhaps'; .* must hold 0 or 1"):
        loaded(path, text="comment_text", label="toxic,threat,insult", test_share=0)


def test_labels_with_commas_are_asked_about(tmp_path):
    rows = [(t, ("warm", "warm,kind")[i % 2] if c == "good" else "cold") for i, (t, c) in enumerate(ROWS * 2)]
    rows = [(f"{t} {i}", c) for i, (t, c) in enumerate(rows)]
    rows[0] = (rows[0][0], "warm,kind")
    assert any('["kind", "warm"]' in n for n in loaded(written(tmp_path, "a.csv", quoted(",", rows))).notes)


def test_decimal_commas_are_numbers_and_said(tmp_path):
    rows = [(t, f"{1 + 0.3 * i:.1f}".replace(".", ",")) for i, (t, _) in enumerate(ROWS)]
    data = loaded(written(tmp_path, "a.csv", quoted(";", rows, ("text", "score")), "utf-8-sig"), test_share=0)
    assert data.task.name == "regression" and any("decimal commas" in n for n in data.notes)
    values = data.task.in_unit(data.task.targets(data.train, data.columns))
    assert values.tolist() == pytest.approx([1 + 0.3 * i for i in range(len(ROWS))], abs=1e-5)


def test_regression_is_learnt_without_unit_and_answered_in_it(tmp_path):
    rows = [(t, str(200_000.5 + 1000 * i)) for i, (t, _) in enumerate(ROWS)]
    data = loaded(written(tmp_path, "a.csv", quoted(",", rows, ("text", "score"))), test_share=0)
    targets = data.task.targets(data.train, data.columns)
    assert abs(targets.mean()) < 1e-4 and abs(targets.std() - 1) < 1e-4
    assert data.task.decode(targets[:, None]) == pytest.approx(
        [200_000.5 + 1000 * i for i in range(len(ROWS))], rel=1e-5
    )


# --- rows that cannot be used, and columns


def test_rows_that_cannot_be_used_are_set_aside_before_the_split_and_counted(tmp_path):
    many = [(f"{t} {i}", c) for i in range(10) for t, c in ROWS]
    many[3], many[50] = ("", "good"), ("no label here", "")
    path = written(tmp_path, "a.csv", quoted(",", many))
    data = loaded(path)
    assert len(rows_of(data)) == len(many) - 2
    assert [(p.rsplit(":", 1)[1], why) for p, why in data.aside] == [
        ("5", "field 'text' is empty"), ("52", "no label in field 'label'"),
    ]  # fmt: skip
    assert any("set aside: 2 of 120 rows" in n for n in data.notes)
    with pytest.raises(
        DataError, match=r"2 of 120 rows cannot be used \(1\.7%, accepted are 1\.0%\).*a\.csv:5.*--skip-bad"
    ):
        loaded(path, accept_refused=0.01)
    assert loaded(path, accept_refused=1.0).aside == data.aside
    with pytest.raises(DataError, match="Is it the right file"):
        loaded(
            written(tmp_path, "b.csv", ["text,label", *(f"{t.replace(',', '')}," for t, _ in ROWS)]), accept_refused=1.0
        )


def test_a_class_of_one_row_goes_to_training_and_is_said(tmp_path):
    data = loaded(written(tmp_path, "a.csv", quoted(",", [*ROWS, ("one of a kind", "odd")])))
    assert "odd" in {r["label"] for r in data.train.rows} and any(
        "classes of one row" in n and "'odd'" in n for n in data.notes
    )


def test_only_the_column_that_is_not_certain_is_asked_for(tmp_path):
    path = written(tmp_path, "a.csv", quoted(",", ROWS, ("customer_message", "intent")))
    with pytest.raises(
        DataError, match=r"label = 'intent'; which column is the text\? For example --text customer_message"
    ):
        loaded(path)
    assert loaded(path, text="customer_message").columns.label == "intent"
    path = written(tmp_path, "b.csv", quoted(",", ROWS, ("text", "polarity")))
    with pytest.raises(DataError, match=r"text = 'text'; is 'polarity' its label\? Say so with --label polarity"):
        loaded(path)
    path = written(tmp_path, "c.csv", quoted(",", ROWS, ("what they said", "kind")))
    with pytest.raises(DataError, match=r"--text 'what they said' --label kind"):
        loaded(path)

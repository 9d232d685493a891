"""`luthier predict` as a user calls it: row by row, from files and pipes, into files."""

import csv
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
from cli.conftest import Call

ROWS = [{"id": 1, "text": "how good is it"}, {"id": 2, "text": ""}, {"id": 3, "text": "why bad"}]


@pytest.fixture
def run(luthier: Call, model: Path, tmp_path: Path) -> str:
    lines = [f"{w} {label} is it,{label}" for label in ("good", "bad") for w in ("how", "what", "who", "why")]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    words = ("train", model, "--data", tmp_path / "train.csv", "--steps", 3, "--threads", 1, "--precision", "fp32")
    assert luthier(*words, "--test-share", 0, "--out", "run").code == 0
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return "run"


def test_one_empty_row_has_its_reason_and_the_others_their_answers(luthier: Call, run: str) -> None:
    answer = luthier("predict", run, "--data", "asked.jsonl")
    assert answer.code == 0
    lines = [line.split("\t") for line in answer.out.splitlines()]
    assert [line[0] for line in lines] == ["1", "2", "3"]
    assert lines[0][1] in ("good", "bad") and 0 < float(lines[0][2]) < 1
    assert lines[1][1:] == ["", "", "field 'text' is empty"]
    assert "1 of 3 rows cannot be answered: asked.jsonl:2: field 'text' is empty" in answer.err
    told = luthier("predict", run, "--data", "asked.jsonl", "--json").json["answers"]
    assert told[1] == {"refused": "field 'text' is empty"} and told[2]["label"] in ("good", "bad")


def test_strict_answers_none_where_one_cannot_be_read(luthier: Call, run: str) -> None:
    answer = luthier("predict", run, "--data", "asked.jsonl", "--strict", "--out", "answers.csv")
    assert answer.code != 0 and answer.out == "" and "asked.jsonl:2: field 'text' is empty" in answer.err
    assert not Path("answers.csv").exists()


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_answers_stand_beside_the_columns_of_their_rows_in_a_file(luthier: Call, run: str, ending: str) -> None:
    rows = [{**row, "label": "good"} for row in ROWS]
    Path("asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = luthier("predict", run, "--data", "asked.jsonl", "--json").json["answers"]
    name = f"answers.{ending}"
    answer = luthier("predict", run, "--data", "asked.jsonl", "--out", name)
    assert answer.code == 0 and answer.out.strip() == f"{name}: 3 rows"
    if ending == "csv":
        found = list(csv.DictReader(io.StringIO(Path(name).read_text())))
    elif ending == "jsonl":
        found = [json.loads(line) for line in Path(name).read_text().splitlines()]
    else:
        found = pyarrow.parquet.read_table(name).to_pylist()
    assert list(found[0]) == ["id", "text", "label", "predicted_label", "probability", "note"]
    assert [row["text"] for row in found] == [row["text"] for row in ROWS]
    assert found[0]["predicted_label"] == told[0]["label"]
    assert float(found[0]["probability"]) == pytest.approx(told[0]["probabilities"][told[0]["label"]])
    assert not found[1]["predicted_label"] and found[1]["note"] == "field 'text' is empty"
    again = luthier("predict", run, "--data", "asked.jsonl", "--out", name)
    assert again.code == 2 and "is there already" in again.err


def test_an_ending_that_no_answers_are_written_to_is_refused_before_the_model_is_loaded(luthier: Call) -> None:
    answer = luthier("predict", "no-run", "--text", "a", "--out", "answers.xml")
    assert answer.code == 2 and ".csv, .jsonl, .parquet" in answer.err


@pytest.mark.parametrize("content", ['{"text": "how good"}\n{"text": ""}\n', 'text\nhow good\n""\n'])
def test_rows_come_from_standard_input(luthier: Call, run: str, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = luthier("predict", run, "--text", "how good", "--json").json["answers"][0]
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content.encode())))
    answer = luthier("predict", run, "--data", "-", "--json")
    assert answer.json["answers"][0]["label"] == wanted["label"]
    assert "refused" in answer.json["answers"][1] and "standard input:" in answer.err


def test_answers_below_a_probability_are_unsure_and_the_label_stands_beside(luthier: Call, run: str) -> None:
    asked = luthier("predict", run, "--data", "asked.jsonl", "--json").json["answers"]
    sure = [max(a["probabilities"].values()) for a in asked if "label" in a]
    between = str(sum(sure) / 2)  # two rows have an answer: one is surer, one is less sure
    answer = luthier("predict", run, "--data", "asked.jsonl", "--unsure", between, "--out", "sorted.csv")
    assert answer.code == 0 and "1 of 3 rows are unsure" in answer.err
    rows = list(csv.DictReader(io.StringIO(Path("sorted.csv").read_text())))
    for row, told in zip(rows, asked, strict=True):
        if "label" in told:
            assert row["label"] == told["label"]
            assert (row["answer"] == "unsure") == (float(row["probability"]) < float(between))
            assert row["answer"] in ("unsure", row["label"])
        else:
            assert not row["answer"] and row["note"]
    shown = luthier("predict", run, "--text", "how good is it", "--unsure", 1).out.split("\t")
    assert shown[0] == "unsure" and 0 < float(shown[1]) < 1
    assert luthier("predict", run, "--text", "how", "--unsure", 0.01, "--json").json["answers"][0]["unsure"] is False
    wrong = luthier("predict", run, "--text", "how", "--unsure", 60)
    assert wrong.code == 2 and "--unsure 60" in wrong.err and "0.6" in wrong.err

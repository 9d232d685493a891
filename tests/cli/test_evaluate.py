"""`luthier evaluate` as a user calls it: other rows are scored as the run's held-out rows were."""

import csv
import json
from pathlib import Path

import pytest
from cli.conftest import Call
from little import little_data, little_model
from word_tables import WORDS


@pytest.mark.parametrize("kind", ["class", "price", "words", "write"])
def test_the_held_out_rows_as_a_file_get_the_scores_of_the_run(luthier: Call, tmp_path: Path, kind: str) -> None:
    ending = "jsonl" if kind == "words" else "csv"
    data, test = tmp_path / f"rows.{ending}", tmp_path / f"test.{ending}"
    for path, seed in ((data, 0), (test, 1)):
        if kind == "words":
            cuts = [WORDS[i : i + 5] for i in range(seed, 30, 2)]
            path.write_text(
                "".join(json.dumps({"tokens": c, "tags": ["X" if w < "h" else "Y" for w in c]}) + "\n" for c in cuts)
            )
        elif kind == "price":
            lines = [f"{' '.join(WORDS[i : i + 4])},{250_000 + 3000 * ((i + seed) % 7)}.5" for i in range(seed, 30, 2)]
            path.write_text("\n".join(["text,score", *lines]) + "\n")
        else:
            little_data(path, kind="labelled" if kind == "class" else "turns", seed=seed)
    model = little_model(tmp_path / "model", "llama" if kind == "write" else "bert")
    words = ("train", model, "--data", data, "--test", test, "--steps", 6, "--threads", 1, "--precision", "fp32")
    trained = luthier(*words, "--out", "run", "--json")
    assert trained.code == 0, trained.err
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    found = luthier("evaluate", "run", "--data", test, "--json")
    assert found.code == 0, found.err
    assert found.json["scores"] == pytest.approx(trained.json["scores"], rel=1e-5)
    if kind in ("class", "price"):
        # But for the warnings, all of it: numbers of what was learnt too.
        ours, run = found.json["quality"], trained.json["quality"]
        assert ours["classes"] == run["classes"] and ours["confusion"] == run["confusion"]
        assert ours["score"] == pytest.approx(run["score"]) and ours["baseline"] == run["baseline"]
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before, "nothing was written"


def test_answers_are_written_only_where_a_file_is_named(luthier: Call, finished: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label\nhow is cat one,animal\nred is two,colour\n")
    shown = luthier("evaluate", finished, "--data", rows, "--out", "answers.csv")
    assert shown.code == 0 and "accuracy" in shown.out and "2 rows of" in shown.out, shown.err
    with Path("answers.csv").open(newline="") as file:
        answers = list(csv.DictReader(file))
    assert [a["wanted"] for a in answers] == ["animal", "colour"]
    assert {a["answer"] for a in answers} <= {"animal", "colour"} and answers[0]["place"].endswith("rows.csv:2")
    again = luthier("evaluate", finished, "--data", rows, "--out", "answers.csv")
    assert again.code == 2 and "answers.csv: is there already" in again.err


def test_rows_that_do_not_say_what_is_right_are_named(luthier: Call, finished: Path, tmp_path: Path) -> None:
    bare, half, strange = (tmp_path / f"{name}.csv" for name in ("bare", "half", "strange"))
    bare.write_text("text,kind\nhow is cat one,animal\n")
    half.write_text("text,label\nhow is cat one,animal\nred is two,\n,colour\n")
    strange.write_text("text,label\nhow is cat one,planet\n")
    no_label = luthier("evaluate", finished, "--data", bare)
    assert no_label.code == 3 and "no column 'label'" in no_label.err and "'kind'" in no_label.err
    empty = luthier("evaluate", finished, "--data", half)
    assert empty.code == 3 and "half.csv:3" in empty.err and "--skip-bad" in empty.err
    rest = luthier("evaluate", finished, "--data", half, "--skip-bad", "--json")
    assert rest.json["rows"] == 1 and len(rest.json["left_out"]) == 2
    assert "half.csv:3" in rest.json["left_out"][0][0] and "half.csv:4" in rest.json["left_out"][1][0]
    unknown = luthier("evaluate", finished, "--data", strange)
    assert unknown.code == 3 and "'planet'" in unknown.err and "strange.csv:2" in unknown.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--harness", "arc_easy", "--out", "answers.csv"), "--out is said of rows, by --data"),
        (("--harness", "arc_easy", "--skip-bad"), "--skip-bad is said of rows"),
        (("--data", "rows.csv", "--harness-limit", 3), "--harness-limit is said of a task, by --harness"),
        (("--data", "rows.csv", "--harness-shots", 0), "--harness-shots is said"),
        (("--data", "rows.csv", "--harness-chat"), "--harness-chat is said"),
    ],
)
def test_an_option_that_would_say_nothing_is_refused(luthier: Call, words: tuple[object, ...], told: str) -> None:
    answer = luthier("evaluate", "nowhere", *words)
    assert answer.code == 2 and told in answer.err

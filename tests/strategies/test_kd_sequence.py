"""kd_sequence: a teacher's answers in place of the rows' own."""

import dataclasses
import json

import pytest
import torch
from little import little_data, little_model, little_spec

from luthier.core import ConfigError, DataError
from luthier.data.rows import load_rows
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.workflow import train
from luthier.workflow.prediction import Predictor
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
GIVEN = {"kd_sequence.beams": 2, "kd_sequence.new_tokens": 6}


def spec_of(home, out, kind="llama", plain=False, **changes):
    model = little_model(home / kind, kind)
    source = little_data(home / "turns.csv", rows=30, kind="turns")
    settings = {} if plain else {"kd_sequence.teacher_model": str(model), **GIVEN, **changes.pop("settings", {})}
    given = {
        "model": str(model), "method": "full", "settings": settings, "strategy": "kd_sequence", "steps": 60,
        "data": DataSpec(source=str(source), prompt="prompt", response="response"), "optim": OptimSpec(lr=1e-2),
        "trunk_dropout": "off",
    }  # fmt: skip
    return little_spec(home, kind=kind, out=str(out), **{**given, **changes})


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("kd_sequence")


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "whole"))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.acid("kd_sequence", 1)
def test_kd_sequence_rows_are_made_again_alike_and_say_who_wrote_them_and_how(home, done, tmp_path):
    again = follow(spec_of(home, tmp_path / "again"))
    for name in ("rows-written.jsonl", "rows-made.jsonl"):
        assert (done.path / name).read_bytes() == (again.path / name).read_bytes()
    (made,) = lines(done.path / "rows-made.jsonl")
    assert made["teacher"] == json.loads((done.path / "1-teacher" / "lineage.json").read_text())["tuning"]
    assert (made["beams"], made["new_tokens"]) == (2, 6)


@pytest.fixture(scope="module")
def other_teacher(home):
    """A finished run that answers every prompt with one word, which no row does."""
    rows = load_rows(str(little_data(home / "turns.csv", rows=30, kind="turns")))[0].rows
    path = home / "others.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["prompt"], "response": "moon"}) + "\n" for row in rows))
    data = DataSpec(source=str(path), prompt="prompt", response="response")
    return train(spec_of(home, home / "other", strategy=None, data=data, steps=40, plain=True)).path


@pytest.mark.acid("kd_sequence", 2)
@pytest.mark.parametrize("references", [False, True])
def test_kd_sequence_the_student_sees_no_answer_of_the_rows_unless_asked_for(home, other_teacher, tmp_path, references):
    given = {"kd_sequence.teacher_model": "", "kd_sequence.teacher": str(other_teacher)}
    given["kd_sequence.references"] = references
    done = follow(spec_of(home, tmp_path / "out", settings=given, steps=2))
    assert list(done.phases) == ["student"]
    spec = RunFolder.open(done.result, write=False).spec
    assert spec["data"]["source"].endswith("rows-written.jsonl") and spec["data"]["test_share"] == 0
    written, held = lines(done.path / "rows-written.jsonl"), lines(done.path / "rows-held.jsonl")
    (made,) = lines(done.path / "rows-made.jsonl")
    own = [row for row in written if row["response"] != "moon"]
    assert made["kept"] > 0 and len(written) - len(own) == made["kept"]
    assert len(own) == (made["rows"] if references else 0)
    source = {row["prompt"]: row["response"] for row in load_rows(str(home / "turns.csv"))[0].rows}
    assert held and all(source[row["prompt"]] == row["response"] for row in [*held, *own])
    assert not {row["prompt"] for row in held} & {row["prompt"] for row in written}


@pytest.mark.acid("kd_sequence", 3)
def test_kd_sequence_answers_without_an_end_are_counted_and_dropped(home, tmp_path):
    rows = load_rows(str(little_data(home / "turns.csv", rows=30, kind="turns")))[0].rows
    for row in rows:  # the last word of a prompt says how long its answer is
        row["response"] = "moon" if row["prompt"].endswith("red") else "moon red moon red moon"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataSpec(source=str(tmp_path / "rows.jsonl"), prompt="prompt", response="response")
    spec = spec_of(home, tmp_path / "out", data=data, settings={"kd_sequence.new_tokens": 3})
    path = follow(spec).path
    (made,), kept = lines(path / "rows-made.jsonl"), lines(path / "rows-written.jsonl")
    assert made["dropped"] > 0 and made["kept"] == len(kept) and made["kept"] + made["dropped"] == made["rows"]
    table = load_rows(str(tmp_path / "rows.jsonl"))[0]
    found = Predictor(path / "1-teacher").written(table, max_new_tokens=3, beams=2)
    endless = {row["prompt"] for row, (_, ended) in zip(table.rows, found, strict=True) if not ended}
    assert endless and not endless & {row["prompt"] for row in kept}


def test_kd_sequence_a_teacher_that_never_ends_is_refused_and_counted(home, other_teacher, tmp_path):
    given = {"kd_sequence.teacher_model": "", "kd_sequence.teacher": str(other_teacher), "kd_sequence.new_tokens": 1}
    with pytest.raises(DataError, match="no answer ended within 1 tokens"):
        follow(spec_of(home, tmp_path / "out", settings=given))
    (made,) = lines(tmp_path / "out" / "rows-made.jsonl")
    assert made["kept"] == 0 and made["dropped"] == made["rows"]


@pytest.mark.parametrize(("kind", "method"), [("llama", "lora"), ("llama", "prefix_tuning"), ("t5", "lora")])
def test_kd_sequence_a_beam_goes_with_every_kind_of_model(home, tmp_path, kind, method):
    spec = spec_of(home, tmp_path / "teacher", kind, plain=True, strategy=None, method=method, steps=40)
    spec = dataclasses.replace(spec, task="seq2seq" if kind == "t5" else "causal_lm")
    train(spec)
    given = {"kd_sequence.teacher_model": "", "kd_sequence.teacher": str(tmp_path / "teacher")}
    student = spec_of(home, tmp_path / "out", kind, settings=given, steps=4, method="lora")
    found = follow(dataclasses.replace(student, task=spec.task))
    assert lines(found.path / "rows-made.jsonl")[0]["kept"] > 0


def test_kd_sequence_one_beam_is_what_the_run_answers(done):
    written = load_rows(str(done.path / "rows-held.jsonl"))[0]
    teacher = Predictor(done.path / "1-teacher")
    greedy = [text for text, _ in teacher.written(written, max_new_tokens=6)]
    assert greedy == [answer["text"] for answer in teacher.rows(written, max_new_tokens=6)]


def test_kd_sequence_is_refused_before_anything_is_written(home, tmp_path):
    bert = little_spec(home, out=str(tmp_path / "labels"), steps=2)
    train(bert)
    for words, changes in (
        ("needs one teacher", {"settings": {"kd_sequence.teacher_model": ""}}),
        ("needs one teacher", {"settings": {"kd_sequence.teacher": "runs/big"}}),
        ("are labelled", {"data": bert.data}),
        (
            "writes no text",
            {"settings": {"kd_sequence.teacher_model": "", "kd_sequence.teacher": str(tmp_path / "labels")}},
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()

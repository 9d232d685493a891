"""task_mixture: sets of rows put into words."""

import dataclasses
import json

import pytest
import torch
from little import little_data, little_model, little_spec

from luthier.core import ConfigError, DataError
from luthier.data.rows import load_rows
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec
from luthier.training.listener import Listener
from luthier.workflow.recipes import _Desk, _plan, follow

torch.set_num_threads(1)
TOLD = """
[train]
cluster = "mood"
templates = ["{text} ? ||| {label}", "say {label} ||| {text}", "is it {label} ? {text} ||| it is {label}"]
words.label = { good = "hello", bad = "why", red = "blue" }
[turns]
templates = ["{prompt} ||| {response}"]
[far]
cluster = "far"
templates = ["answer : {text} ||| {label}"]
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    found = tmp_path_factory.mktemp("mixture")
    (found / "told.toml").write_text(TOLD)
    own = load_rows(str(little_data(found / "rows.csv")))[0].rows
    far = load_rows(str(little_data(found / "other.csv", rows=12, seed=8)))[0].rows
    lines = [f"{row['text']},{row['label']}" for row in [*far, *own[:3]]]  # three rows stand in both
    (found / "far.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return found


def spec_of(home, out, **changes):
    also = (f"turns={little_data(home / 'turns.csv', rows=20, kind='turns')}", f"far={home / 'far.csv'}")
    settings = {"task_mixture.templates": str(home / "told.toml"), "task_mixture.hold_out": "far"}
    given = {
        "model": str(little_model(home / "llama", "llama")), "data": DataSpec(source=str(home / "rows.csv")),
        "method": "lora", "settings": settings | changes.pop("settings", {}), "strategy": "task_mixture", "steps": 2,
        "also": also,
    }  # fmt: skip
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def done(home):
    return follow(spec_of(home, home / "done"))


@pytest.mark.acid("task_mixture", 1)
def test_task_mixture_nothing_of_a_held_out_cluster_is_learnt(home, done):
    spec = RunFolder.open(done.result, write=False).spec
    assert spec["strategy"] == "mtl_sampling" and spec["data"]["test"].endswith("rows-held.jsonl")
    assert [word.partition("=")[0] for word in spec["also"]] == ["turns"]
    held = {row["text"] for row in load_rows(str(home / "far.csv"))[0].rows}
    learnt = [*lines(done.path / "rows-set-train.jsonl"), *lines(done.path / "rows-set-turns.jsonl")]
    assert learnt and not [line for line in learnt if any(text in line["prompt"] + line["response"] for text in held)]
    assert len(lines(done.path / "rows-held.jsonl")) == 15
    made = {one["set"]: one for one in lines(done.path / "rows-made.jsonl")}
    assert made["train"]["left_out"] == 3 and made["turns"]["left_out"] == 3 and made["far"]["held_out"] == 15


@pytest.mark.acid("task_mixture", 2)
def test_task_mixture_every_template_fits_every_row_or_the_row_is_named(home, tmp_path):
    rows = home / "rows.csv"
    (tmp_path / "told.toml").write_text(TOLD.replace("say {label}", "say {labels}"))
    given = {"task_mixture.templates": str(tmp_path / "told.toml")}
    with pytest.raises(DataError, match=r"rows.csv:5: nothing in 'labels'"):
        follow(spec_of(home, tmp_path / "out", settings=given))
    blank = tmp_path / "blank.csv"
    blank.write_text(rows.read_text() + "moon sun,\n")
    with pytest.raises(DataError, match=r"blank.csv:48: nothing in 'label'"):
        follow(spec_of(home, tmp_path / "out", data=DataSpec(source=str(blank))))
    assert not (tmp_path / "out").exists()


@pytest.mark.acid("task_mixture", 3)
def test_task_mixture_answers_can_be_read_back_as_labels(home, done, tmp_path):
    words = {"hello": "good", "why": "bad", "blue": "red"}
    label_of = {row["text"]: row["label"] for row in load_rows(str(home / "rows.csv"))[0].rows}
    seen = set()
    for line in lines(done.path / "rows-set-train.jsonl"):
        number = int(line["template"])
        seen.add(number)
        answer = line["response"].removeprefix("it is ")
        text = {0: line["prompt"].removesuffix(" ?"), 1: line["response"], 2: line["prompt"].partition("? ")[2]}[number]
        said = line["prompt"].removeprefix("say ") if number == 1 else answer
        assert words[said] == label_of[text]
    assert seen == {0, 1, 2}
    (tmp_path / "told.toml").write_text(TOLD.replace('bad = "why"', 'bad = "hello"'))
    with pytest.raises(ConfigError, match="two cells of 'label' have one word"):
        follow(spec_of(home, tmp_path / "out", settings={"task_mixture.templates": str(tmp_path / "told.toml")}))


@pytest.mark.acid("task_mixture", 4)
def test_task_mixture_the_draw_of_templates_is_named_by_the_seed(home, done, tmp_path):
    drawn = {}
    for seed in (0, 5):
        again = follow(spec_of(home, tmp_path / f"out-{seed}", seed=seed))
        drawn[seed] = [line["template"] for line in lines(again.path / "rows-set-train.jsonl")]
    assert drawn[0] == [line["template"] for line in lines(done.path / "rows-set-train.jsonl")] != drawn[5]


def test_task_mixture_what_cannot_be_mixed_is_refused(home, tmp_path):
    for words, changes in (
        ("is no file", {"settings": {"task_mixture.templates": "no.toml"}}),
        ("no set is of the cluster 'near'", {"settings": {"task_mixture.hold_out": "near"}}),
        ("all sets are held out", {"settings": {"task_mixture.hold_out": "mood, turns, far"}}),
        (
            "learnt as one set and held out as another",
            {"also": (f"turns={home / 'far.csv'}", f"far={home / 'far.csv'}")},
        ),
        (r"\[new\] needs templates", {"also": (f"new={home / 'far.csv'}",), "settings": {"task_mixture.hold_out": ""}}),
        ("reads alone", {"model": str(little_model(home / "bert", "bert"))}),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
    without = spec_of(home, tmp_path / "alone", also=None, settings={"task_mixture.hold_out": ""})
    spec = RunFolder.open(follow(dataclasses.replace(without)).result, write=False).spec
    assert spec["strategy"] is None and spec["data"]["test"] is None


def test_task_mixture_rows_that_share_a_text_with_held_out_ones_are_said_and_some_must_be_left(home, tmp_path):
    said, lines = [], (home / "rows.csv").read_text().splitlines()
    listener = Listener()
    listener.say = said.append
    (tmp_path / "test.csv").write_text("\n".join([lines[0], *lines[3:5]]) + "\n")
    given = {"also": None, "settings": {"task_mixture.hold_out": ""}}
    data = DataSpec(source=str(home / "rows.csv"), test=str(tmp_path / "test.csv"))
    desk = _Desk(tmp_path, _plan(spec_of(home, tmp_path / "out", data=data, **given)), listener)
    next(desk.plan.recipe.phases(desk.plan, desk))
    (line,) = [line for line in said if "share a text" in line]
    assert f"2 of {len(lines) - 1} rows of train share a text with held-out rows, and are not learnt: '" in line
    for name, rows in (("rows.csv", lines[1:30]), ("test.csv", lines[30:])):  # a label that reads as a text
        (tmp_path / name).write_text("\n".join([lines[0], *(f"{row.split(',')[0]},so it is" for row in rows)]) + "\n")
    data = dataclasses.replace(data, source=str(tmp_path / "rows.csv"))
    with pytest.raises(ConfigError, match=r"none is left to learn: 'so it is' stands in 29\. Other rows"):
        follow(spec_of(home, tmp_path / "out", data=data, **given))
    assert not (tmp_path / "out").exists()


def test_task_mixture_test_rows_of_each_set_are_worded_scored_and_not_learnt(home, tmp_path, monkeypatch):
    own = load_rows(str(home / "rows.csv"))[0].rows

    def write(name, rows):
        (tmp_path / name).write_text("\n".join(["text;label", *(f"{r['text']};{r['label']}" for r in rows)]) + "\n")
        return str(tmp_path / name)

    halves = {write("turns.csv", own[10:14]): write("turns-test.csv", own[14:16])}  # as a sample has them

    def loaded(source, **stored):
        table, none = load_rows(source, **stored)
        return table, load_rows(halves[source], **stored)[0] if source in halves else none

    monkeypatch.setattr("luthier.data.rows.load_rows", loaded)
    monkeypatch.setattr("luthier.strategies.recipes.task_mixture.load_rows", loaded)
    data = DataSpec(source=write("rows.csv", own), test=write("test.csv", own[:5]), delimiter=";")
    (tmp_path / "told.toml").write_text(TOLD.replace("{prompt} ||| {response}", "{text} ||| {label}"))
    given = {"task_mixture.templates": str(tmp_path / "told.toml"), "task_mixture.hold_out": ""}
    changes = {"also": (f"turns={tmp_path / 'turns.csv'}",), "settings": given}
    with pytest.raises(ConfigError, match=r"data.fold parts the rows of --data, and turns has held-out rows already"):
        folds = dataclasses.replace(data, test=None, fold="1/3")
        follow(spec_of(home, tmp_path / "fold", data=folds, **changes))
    made = follow(spec_of(home, tmp_path / "out", data=data, **changes))
    spec = RunFolder.open(made.result, write=False).spec
    assert spec["data"]["test"].endswith("rows-held.jsonl") and spec["data"]["test_share"] == 0
    by_set = [lines(made.path / f"rows-held-{name}.jsonl") for name in ("train", "turns")]
    assert [len(one) for one in by_set] == [5, 2]
    assert lines(made.path / "rows-held.jsonl") == [*by_set[0], *by_set[1]]
    held = {row["text"] for row in (*own[:5], *own[14:16])}
    learnt = [*lines(made.path / "rows-set-train.jsonl"), *lines(made.path / "rows-set-turns.jsonl")]
    assert learnt and not [line for line in learnt if any(text in line["prompt"] + line["response"] for text in held)]

"""cai: a model criticises and rewrites its own answers under principles, then learns which it prefers."""

import json

import numpy as np
import pytest
import torch
from little import at_call, little_data, little_model, little_spec

from luthier.core import ConfigError, DataError
from luthier.data.refusals import lines_of, ways_of
from luthier.runs import RunFolder
from luthier.runs.spec import CheckpointSpec, DataSpec, OptimSpec
from luthier.surgery import tuning_files
from luthier.training.loop import Loop
from luthier.workflow import recipes
from luthier.workflow.recipes import follow
from luthier.workflow.speaker import Speaker

torch.set_num_threads(1)
RULES = ("say one moon", "say two moon", "say red cat")
CRITIC = "criticise {prompt} | {answer} | {principle}"
REWRITE = "rewrite {prompt} | {answer} | {principle} | {critique}"
CHOOSE = "choose {prompt} | {first} | {second} | {principle} | {one} {two}"


class Stub:
    """Answers by what it is asked; notes it."""

    digest = "stub"

    def __init__(self):
        self.heard = []

    def says(self, asked, *, max_new_tokens, sampling=None):
        texts = [messages[0]["content"] for messages in asked]
        self.heard += texts
        return [(self.one(t, None if sampling is None else sampling.seeds[k]), True) for k, t in enumerate(texts)]

    def one(self, text, seed):
        if text.startswith("criticise "):
            return f"bad because {text.rsplit(' | ', 1)[1]}"
        if text.startswith("rewrite "):
            return f"good {text.rsplit('because ', 1)[1]}"
        return "the red moon" if seed is None else " ".join(["cat"] * (1 + seed % 5))

    def chances(self, asked, words):
        self.heard += [messages[0]["content"] for messages in asked]
        parts = [messages[0]["content"].split(" | ") for messages in asked]
        first = np.asarray([0.5 + 0.1 * np.sign(len(p[1]) - len(p[2])) for p in parts])
        return np.stack([first, 1 - first], 1)

    def loss_of(self, answered):
        return float(len(answered))

    def before_tuning(self):
        import contextlib

        return contextlib.nullcontext()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("cai")
    (home / "rules.txt").write_text("# ours\n\n" + "\n".join(RULES) + "\n")
    for name, text in (("critic", CRITIC), ("rewrite", REWRITE), ("choose", CHOOSE)):
        (home / f"{name}.txt").write_text(text)
    rows = [{"prompt": f"what is the {a} {b}"} for a in ("moon", "sun", "cat", "dog") for b in ("one", "two", "red")]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def spec_of(home, out, **changes):
    own = {"principles": "rules", "critique": "critic", "revision": "rewrite", "question": "choose"}
    settings = {f"cai.{name}": str(home / f"{file}.txt") for name, file in own.items()}
    settings |= {"cai.words": "one, two", "cai.new_tokens": 5, **changes.pop("settings", {})}
    given = {
        "model": str(little_model(home / "llama", "llama")), "method": "lora", "settings": settings, "strategy": "cai",
        "data": DataSpec(source=str(little_data(home / "turns.csv", rows=20, kind="turns"))), "steps": 3,
        "also": (f"prompts={home / 'prompts.jsonl'}",), "optim": OptimSpec(lr=1e-2), "trunk_dropout": "off",
    }  # fmt: skip
    return little_spec(home, kind="llama", out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(home):
    with pytest.MonkeyPatch.context() as patch:
        stub = Stub()
        patch.setattr(recipes._Desk, "asked", lambda desk, name: stub)
        done = follow(spec_of(home, home / "whole", settings={"cai.rounds": 2}))
    return done, stub


@pytest.mark.acid("cai", 1)
def test_cai_each_record_holds_the_principle_critique_and_revision_of_every_round(whole):
    records = lines(whole[0].path / "rows-revised.jsonl")
    assert len(records) == 12 and {len(one["rounds"]) for one in records} == {2}
    for one in records:
        assert one["first"] == "the red moon"
        for each in one["rounds"]:
            assert each["principle"] in RULES
            assert each["critique"] == f"bad because {each['principle']}"
            assert each["revision"] == f"good {each['principle']}"
    assert {each["principle"] for one in records for each in one["rounds"]} == set(RULES)
    heard = [text for text in whole[1].heard if text.startswith("criticise") and text.split(" | ")[1] != "the red moon"]
    assert any(text.split(" | ")[1].startswith("good say") for text in heard), (
        "the second round reads the first revision"
    )


@pytest.mark.acid("cai", 2)
def test_cai_the_last_revision_is_learnt_beside_the_rows_that_help_and_then_the_labels(home, whole):
    done = whole[0]
    learnt = {row["response"] for row in lines(done.path / "rows-learnt.jsonl")}
    revised = {one["rounds"][-1]["revision"] for one in lines(done.path / "rows-revised.jsonl")}
    assert revised <= learnt and "the red moon" not in learnt and len(learnt) > len(revised)
    first, last = (RunFolder.open(done.path / name, write=False).spec for name in ("1-revised", "2-preferred"))
    assert first["data"]["source"].endswith("rows-learnt.jsonl") and first["strategy"] is None
    assert last["model"].endswith("1-revised-merged") and last["strategy"] == "dpo"
    assert last["settings"]["dpo.form"] == "shares"
    chosen = lines(done.path / "rows-preferred.jsonl")
    assert chosen and all(len(row["chosen"]) > len(row["rejected"]) and row["share"] == 0.6 for row in chosen)
    (made,) = lines(done.path / "rows-made.jsonl")
    assert made["revisions"] == 12 and made["a"] + made["b"] == len(chosen) and made["same"] + len(chosen) == 12


@pytest.fixture(scope="module")
def measured(home):
    """Under one other principle, what was tuned speaks for itself."""
    (home / "one.txt").write_text("say three city\n")
    spec = spec_of(
        home, home / "measured", steps=15, settings={"cai.new_tokens": 8, "cai.principles": str(home / "one.txt")}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            recipes._Desk, "asked", lambda desk, name: Stub() if name == spec.model else Speaker(name, precision="fp32")
        )
        return follow(spec)


@pytest.mark.acid("cai", 3)
def test_cai_refusals_and_help_are_measured_before_and_after(measured):
    before, after = lines(measured.path / "rows-measured.jsonl")
    assert (before["who"], after["who"]) == ("before", "after") and before["prompts"] == after["prompts"] == 12
    held = lines(measured.path / "rows-held.jsonl")
    assert before["helpful"] == after["helpful"] == len(held) == 4
    answered = [([{"role": "user", "content": row["prompt"]}], row["response"]) for row in held]
    base, last = (Speaker(str(measured.path / name)) for name in ("1-revised", "2-preferred"))
    losses = [one.loss_of(answered) for one in (base, last)]
    with base.before_tuning():
        assert before["helpful_loss"] == pytest.approx(base.loss_of(answered), abs=1e-6)
    assert after["helpful_loss"] == pytest.approx(losses[1], abs=1e-6) and losses[0] < before["helpful_loss"] - 0.1
    scores = json.loads((measured.path / "1-revised" / "scores.json").read_text())
    assert losses[0] == pytest.approx(scores["loss"], abs=1e-4), "the loss that the run scored itself by"


@pytest.mark.acid("cai", 4)
def test_cai_principles_are_data(measured):
    records = lines(measured.path / "rows-revised.jsonl")
    assert {each["principle"] for one in records for each in one["rounds"]} == {"say three city"}
    assert {row["principle"] for row in lines(measured.path / "rows-pairs.jsonl")} == {"say three city"}


def test_cai_stopped_in_its_second_run_it_writes_nothing_twice_and_ends_alike(home, whole, tmp_path, monkeypatch):
    stub = Stub()
    monkeypatch.setattr(recipes._Desk, "asked", lambda desk, name: stub)
    spec = spec_of(home, tmp_path / "out", settings={"cai.rounds": 2}, checkpoint=CheckpointSpec(every_steps=1))

    def kill():
        raise KeyError("killed")

    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_train_step", 5, kill)
        with pytest.raises(KeyError):
            follow(spec)
    stub.heard.clear()
    done = follow(tmp_path / "out")
    assert not [text for text in stub.heard[1:] if text.startswith(("criticise", "rewrite", "choose"))]
    for phase in ("1-revised", "2-preferred"):
        mine, theirs = (tuning_files.weights_digest(path / phase / "tuning") for path in (done.path, whole[0].path))
        assert mine == theirs
    for name in ("revised", "pairs", "preferred", "made", "measured"):
        assert (done.path / f"rows-{name}.jsonl").read_bytes() == (whole[0].path / f"rows-{name}.jsonl").read_bytes()


def test_cai_bad_input_is_refused_before_anything_is_written(home, tmp_path):
    (tmp_path / "none.txt").write_text("# nothing\n\n")
    (tmp_path / "twice.txt").write_text("be kind\nbe  kind\n")
    (tmp_path / "short.txt").write_text("{prompt} {answer}")
    (tmp_path / "no.jsonl").write_text("")
    for error, words, changes in (
        (ConfigError, "name a text file", {"settings": {"cai.principles": ""}}),
        (ConfigError, "holds no principles", {"settings": {"cai.principles": str(tmp_path / "none.txt")}}),
        (ConfigError, "stands there twice", {"settings": {"cai.principles": str(tmp_path / "twice.txt")}}),
        (ConfigError, "has no {principle}", {"settings": {"cai.critique": str(tmp_path / "short.txt")}}),
        (ConfigError, "--also prompts=FILE", {"also": None}),
        (DataError, "no.jsonl", {"also": (f"prompts={tmp_path / 'no.jsonl'}",)}),
        (ConfigError, "does not merge", {"method": "prefix_tuning"}),
        (ConfigError, "rows are preferred", {"data": DataSpec(source=str(little_data(home / "p.csv", kind="pairs")))}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists(), words


def test_cai_our_own_principles_can_be_read_and_phrases_tell_refusals():
    assert len(lines_of("docs/files/principles.txt", "the principles")) == 8
    assert ways_of(["I\u2019m SORRY,  but no", "a cannot of worms", "well " * 60 + "i cannot", ""]) == [
        "refused", "complied", "complied", "empty"
    ]  # fmt: skip
    assert ways_of(["no moon today"], ["no moon"]) == ["refused"] and ways_of(["no moonlight"], ["no moon"]) == [
        "complied"
    ]

"""rlaif: a model's shares in place of people's labels."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from little import at_call, little_data, little_model, little_spec

from luthier.core import ConfigError, DataError, IntegrityError
from luthier.runs import RunFolder
from luthier.runs.spec import CheckpointSpec, DataSpec, OptimSpec
from luthier.strategies.recipes._labels import labels_of
from luthier.surgery import tuning_files
from luthier.training import STRATEGIES
from luthier.training.loop import Loop
from luthier.workflow import recipes
from luthier.workflow.recipes import follow
from luthier.workflow.speaker import Speaker

torch.set_num_threads(1)
GIVEN = {"rlaif.words": "one, two"}
ASKED = "{prompt} # {one} # {first} # {two} # {second} # the good answer is"


class Stub:
    """A labeller whose chances are a function of the question; it counts what it is asked."""

    def __init__(self, chance, digest="stub"):
        self.chance, self.digest, self.asked = chance, digest, 0

    def chances(self, asked, words):
        self.asked += len(asked)
        first = np.asarray([self.chance(messages[0]["content"]) for messages in asked])
        return np.stack([first, 1 - first], 1)


def longer(text):
    """For the longer answer, by how much; with a leaning to the place that is shown first."""
    _, _, first, _, second, _ = text.split(" # ")
    return 1 / (1 + np.exp(-(0.37 * (len(first) - len(second)) + 1.0)))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("rlaif")
    (home / "question.txt").write_text(ASKED)
    return home


def spec_of(home, out, rows=None, **changes):
    model = little_model(home / "llama", "llama")
    source = rows or little_data(home / "pairs.csv", rows=30, kind="pairs")
    settings = {**GIVEN, "rlaif.question": str(home / "question.txt"), **changes.pop("settings", {})}
    given = {
        "model": str(model), "method": "lora", "settings": settings, "strategy": "rlaif", "steps": 4,
        "data": DataSpec(source=str(source)), "optim": OptimSpec(lr=1e-2), "trunk_dropout": "off",
    }  # fmt: skip
    return little_spec(home, kind="llama", out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stub(monkeypatch):
    one = Stub(longer)
    monkeypatch.setattr(recipes._Desk, "asked", lambda desk, name: one)
    return one


@pytest.fixture(scope="module")
def whole(home):
    """A finished recipe, and what its labeller was asked."""
    one = Stub(longer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipes._Desk, "asked", lambda desk, name: one)
        return follow(spec_of(home, home / "whole")), one.asked


@pytest.mark.acid("rlaif", 1)
def test_rlaif_the_share_of_a_swapped_pair_is_what_is_left_of_one_to_the_bit():
    draw = np.random.default_rng(5)
    known = {}
    stub = Stub(lambda text: known.setdefault(text, float(draw.random())))
    pairs = [("the moon", f"a {i}", f"b {i} {i}") for i in range(200)]
    there = labels_of(stub, ASKED, pairs, ("one", "two"), 0.0)
    back = labels_of(stub, ASKED, [(p, b, a) for p, a, b in pairs], ("one", "two"), 0.0)
    assert all(one.share == 1 - other.share for one, other in zip(there, back, strict=True))
    assert {one.verdict + other.verdict for one, other in zip(there, back, strict=True)} == {"ab", "ba"}
    text = ASKED.format(prompt="the moon", one="one", two="two", first="a 3", second="b 3 3")
    other = ASKED.format(prompt="the moon", one="one", two="two", first="b 3 3", second="a 3")
    assert there[3].share == pytest.approx((known[text] + 1 - known[other]) / 2, abs=1e-15)


@pytest.mark.acid("rlaif", 2)
def test_rlaif_a_labeller_that_names_the_first_is_neutralised_and_is_no_teacher(home, tmp_path, monkeypatch):
    found = labels_of(Stub(lambda text: 0.9), ASKED, [("x", "a", "b")], ("one", "two"), 0.0)
    assert found[0].share == 0.5 and found[0].verdict == "tie" and found[0].swayed
    monkeypatch.setattr(recipes._Desk, "asked", lambda desk, name: Stub(lambda text: 0.9))
    with pytest.raises(DataError, match=r"no answer better than the other in 24 rows; in 24 the order alone"):
        follow(spec_of(home, tmp_path / "out"))
    assert lines(tmp_path / "out" / "rows-made.jsonl")[0]["tie"] == 24, "ties are named"


@pytest.mark.acid("rlaif", 3)
@pytest.mark.parametrize("then", ["reward_model", "dpo"])
def test_rlaif_shares_reach_the_loss_unrounded_and_better_answers_stand_first(home, tmp_path, stub, monkeypatch, then):
    heard, owner = [], STRATEGIES.get(then)
    inner = owner.losses
    monkeypatch.setattr(owner, "losses", lambda self, *given: heard.append(given[-1].clone()) or inner(self, *given))
    done = follow(spec_of(home, tmp_path / "out", settings={"rlaif.then": then}))
    spec = RunFolder.open(done.result, write=False).spec
    assert spec["strategy"] == then and spec["settings"].get("dpo.form") == ("shares" if then == "dpo" else None)
    labels, learnt = lines(done.path / "rows-labels.jsonl"), lines(done.path / "rows-labelled.jsonl")
    assert len(learnt) == sum(row["verdict"] in ("a", "b") for row in labels) > 10
    assert all(len(row["chosen"]) > len(row["rejected"]) for row in learnt)
    wanted = {np.float32(row["share"]).item() for row in [*learnt, *lines(done.path / "rows-held.jsonl")]}
    assert len(wanted) > 5 and all(0.5 < share <= 1 for share in wanted)
    assert {share for marks in heard for share in marks[:, 0].tolist()} <= wanted


@pytest.mark.acid("rlaif", 4)
def test_rlaif_labels_are_kept_by_labeller_and_question_and_a_stopped_recipe_asks_no_row_twice(
    home, tmp_path, stub, whole, monkeypatch
):
    whole, once = whole
    assert once == 2 * 30 + 4, (
        "both orders of each row, and those of one row twice: before the folder is made, and then"
    )
    stopped = spec_of(home, tmp_path / "stopped", checkpoint=CheckpointSpec(every_steps=1))
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "_train_step", 3, lambda: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError):
            follow(stopped)
    stub.asked = 0
    with monkeypatch.context() as patch:
        patch.setattr(stub, "digest", "another")
        with pytest.raises(IntegrityError, match="by another model or with another question"):
            follow(tmp_path / "stopped")
    done = follow(tmp_path / "stopped")
    assert stub.asked == 4, "the first row alone, each time the recipe is asked"
    assert tuning_files.weights_digest(done.result / "tuning") == tuning_files.weights_digest(whole.result / "tuning")
    for name in ("rows-labels.jsonl", "rows-made.jsonl", "rows-labelled.jsonl"):
        assert (done.path / name).read_bytes() == (whole.path / name).read_bytes()
    (made, _) = lines(done.path / "rows-made.jsonl")
    row = lines(done.path / "rows-labels.jsonl")[0]
    assert made["labeller"] == row["labeller"] == "stub" and made["question"] == row["question"]
    file = tmp_path / "stopped" / "rows-labels.jsonl"
    file.write_text(file.read_text().replace('"a"', '"b"', 1))
    with pytest.raises(IntegrityError, match="was changed since it was made"):
        follow(tmp_path / "stopped")


def test_rlaif_pieces_that_were_made_are_not_made_again(home, tmp_path, stub, whole, monkeypatch):
    from luthier.workflow import kept_rows

    monkeypatch.setattr(kept_rows, "PIECE", 10)
    inner, calls = kept_rows.durable.write_bytes, []

    def killed(path, data):
        if path.name == "0001.jsonl":
            calls.append(path)
            raise KeyError("killed")
        return inner(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(kept_rows.durable, "write_bytes", killed)
        with pytest.raises(KeyError):
            follow(spec_of(home, tmp_path / "out"))
    assert (tmp_path / "out" / "rows-labels" / "0000.jsonl").exists()
    stub.asked = 0
    done = follow(tmp_path / "out")
    assert stub.asked == 2 * 20 + 2, "ten of thirty rows stood there"
    assert not (done.path / "rows-labels").exists()
    in_one = (whole[0].path / "rows-labels.jsonl").read_bytes()
    assert (done.path / "rows-labels.jsonl").read_bytes() == in_one, "however many are asked at a time"


def test_rlaif_a_real_model_labels_alone_as_among_others(home):
    speaker = Speaker(str(little_model(home / "llama", "llama")), precision="fp32")
    asked = [[{"role": "user", "content": text}] for text in ("the moon is", "a red dog of rome is", "who is")]
    found = speaker.chances(asked, ("one", "two"))
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-12)
    alone = [speaker.chances([one], ("one", "two"))[0] for one in asked]
    np.testing.assert_allclose(found, alone, atol=1e-6)
    ids = speaker.encoded(asked[:1]).ids
    logits = speaker.tuned.model(input_ids=torch.as_tensor(ids).long()[None]).logits[0, -1]
    one, two = (speaker.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][-1] for word in ("one", "two"))
    assert found[0, 0] == pytest.approx(float(torch.sigmoid(logits[one] - logits[two])), abs=1e-5)
    longer_words = speaker.chances(asked[:1], ("one moon", "two"))  # of several tokens: their product
    assert longer_words[0, 0] < found[0, 0] and longer_words.sum() == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="cannot be told apart"):
        speaker.chances(asked, ("one", "one moon"))


def test_rlaif_with_the_model_itself_end_to_end_and_equal_answers_are_named(home, tmp_path):
    rows = tmp_path / "rows.jsonl"
    told = [{"prompt": f"is the moon {w}", "chosen": f"{w} moon", "rejected": "a dog"} for w in ("red", "blue", "one")]
    told += [{"prompt": "who is it", "chosen": "the sun", "rejected": "the sun "}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told * 4))
    settings = {"rlaif.then": "dpo", "dpo.beta": 0.3}
    spec = spec_of(home, tmp_path / "out", rows, settings=settings, steps=2)
    done = follow(dataclasses.replace(spec, data=dataclasses.replace(spec.data, test_share=0.0, accept_refused=1.0)))
    (made,) = lines(done.path / "rows-made.jsonl")
    assert made["rows"] == 16 and made["same"] == 4 and made["a"] + made["b"] + made["tie"] == 12
    assert RunFolder.open(done.result, write=False).spec["settings"]["dpo.beta"] == 0.3


def test_rlaif_bad_input_is_refused_before_anything_is_written(home, tmp_path):
    (tmp_path / "q.txt").write_text("{prompt} {first}")
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps({"prompt": f"a {i}", "chosen": "b", "rejected": "b"}) + "\n" for i in range(9)))
    for error, words, changes in (
        (ConfigError, "has no {second}", {"settings": {"rlaif.question": str(tmp_path / "q.txt")}}),
        (ConfigError, "cannot be read as the question", {"settings": {"rlaif.question": "no.txt"}}),
        (ConfigError, "give the two words", {"settings": {"rlaif.words": "one"}}),
        (ConfigError, "cannot be told apart", {"settings": {"rlaif.words": "zebra, yak"}}),
        (ConfigError, "these rows are answered", {"rows": little_data(home / "turns.csv", kind="turns")}),
        (DataError, "neither is better", {"rows": same}),
    ):
        with pytest.raises(error, match=words):
            follow(spec_of(home, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists(), words

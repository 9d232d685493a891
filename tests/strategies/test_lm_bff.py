"""lm_bff: words and templates are searched for, and rows are shown beside a row."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fillers import filler, t5
from little import little_data, little_spec

from luthier.core import ConfigError, ModelError
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.strategies.recipes.lm_bff import _searched
from luthier.training.recipe import Guesses
from luthier.workflow import merge, train
from luthier.workflow.gap_search import guess_words, write_fillings
from luthier.workflow.load_model import find_model, load_tokenizer
from luthier.workflow.prediction import Predictor
from luthier.workflow.preparation import prepare
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
WORDS = "good=good, bad=bad, red=red"
TEMPLATE = "{text} ! it is {mask} ."


def spec_of(home, out, **changes):
    rows = little_data(home / "few.csv", rows=36)
    data = {"source": str(rows), "template": TEMPLATE, "words": WORDS, **changes.pop("data", {})}
    settings = {"lm_bff.tries": 1, "lm_bff.shown": 2, "lm_bff.top": 3, **changes.pop("settings", {})}
    given = {
        "model": str(filler(home / "filler")), "data": DataSpec(**data), "method": "full", "settings": settings,
        "strategy": "lm_bff", "steps": 6, "optim": OptimSpec(lr=2e-3), "trunk_dropout": "off",
    }  # fmt: skip
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("lm_bff")


@pytest.fixture(scope="module")
def knowing(home):
    """A model of words that has filled such gaps before, of other rows."""
    other = little_data(home / "other.csv", rows=60, seed=4)
    spec = spec_of(home, home / "before", strategy=None, settings={}, steps=60, data={"source": str(other)})
    merge(train(dataclasses.replace(spec, settings={})).path, home / "knowing")
    return str(home / "knowing")


@pytest.fixture(scope="module")
def done(home, knowing):
    return follow(spec_of(home, home / "done", model=knowing))


@pytest.mark.acid("lm_bff", 1)
def test_lm_bff_says_how_right_the_model_was_before_it_learnt(home, knowing, done):
    learnt, held = lines(done.path / "rows-zero-shot.jsonl")
    assert (learnt["rows"], held["rows"]) == ("learnt", "held") and held["accuracy"] > 0.5, "above one in three"
    # The same by a run that learns next to nothing, on the same held-out rows.
    spec = spec_of(home, home / "nothing", model=knowing, strategy=None, steps=1, optim=OptimSpec(lr=1e-9))
    scores = train(dataclasses.replace(spec, settings={})).scores
    assert held["accuracy"] == pytest.approx(scores["accuracy"])


@pytest.mark.acid("lm_bff", 4)
def test_lm_bff_searched_words_are_single_tokens_and_distinct(done, knowing):
    tokenizer = load_tokenizer(find_model(knowing))
    tried = lines(done.path / "rows-tried.jsonl")
    assert [one["try"] for one in tried] == ["given", "words-1"]
    words = [part.split("=")[1] for part in tried[1]["words"].split(", ")]
    assert len(set(words)) == 3 and words != ["bad", "good", "red"]
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words)


def test_lm_bff_ways_are_sorted_by_right_answers_then_by_what_is_likely():
    draw = np.random.default_rng(3)
    chances = np.log(draw.dirichlet(np.ones(6), size=8)).astype(np.float32)
    label_of, labels = ["a", "b"] * 4, ["a", "b"]
    none = np.zeros((0, 0), dtype=np.float32)
    known = {i: f"w{i}" for i in range(5)}  # the last id is no word
    said = Guesses(chances=chances, words=known, states=none, vectors=none)
    found = _searched(said, label_of, labels, 5, {"a": "w0", "b": "w1"})
    assert len(found) == 5 * 4 - 1 and "a=w0, b=w1" not in found and "w5" not in " ".join(found)

    def worth(way):
        ids = [int(part.split("=w")[1]) for part in way.split(", ")]
        right = (chances[:, ids].argmax(-1) == np.arange(8) % 2).sum()
        return -right, -sum(float(chances[k, ids[k % 2]]) for k in range(8))

    assert found == sorted(found, key=worth)
    sums = [chances[c::2, :5].sum(0).argmax() for c in (0, 1)]
    assert _searched(said, label_of, labels, 1, {"a": "x", "b": "y"}) == (
        [f"a=w{sums[0]}, b=w{sums[1]}"] if sums[0] != sums[1] else []
    )


def test_lm_bff_guesses_are_the_models_own(home):
    spec = dataclasses.replace(spec_of(home, home / "x"), strategy=None, settings={})
    prepared = prepare(spec)
    said = guess_words(spec, prepared.test_table)
    np.testing.assert_allclose(np.exp(said.chances.astype(np.float64)).sum(-1), 1.0, atol=1e-4)
    done = train(dataclasses.replace(spec, steps=1, optim=OptimSpec(lr=1e-9)))
    ids = {word: i for i, word in said.words.items()}
    shares = np.exp(said.chances[:, [ids[w] for w in ("bad", "good", "red")]].astype(np.float64))
    answers = Predictor(done.path).rows(prepared.test_table)
    wanted = [[a["probabilities"][w] for w in ("bad", "good", "red")] for a in answers]
    np.testing.assert_allclose(shares / shares.sum(-1, keepdims=True), wanted, atol=2e-4)


def test_lm_bff_the_best_try_is_chosen_on_rows_that_are_neither_learnt_nor_the_test(home, done):
    learnt, by, held = (
        {row["text"] for row in lines(done.path / f"rows-{name}.jsonl")} for name in ("learnt", "by", "held")
    )
    assert learnt and by and held and not learnt & by and not (learnt | by) & held
    tried = lines(done.path / "rows-tried.jsonl")
    best = max(tried, key=lambda one: one["accuracy"])
    spec = RunFolder.open(done.result, write=False).spec["data"]
    assert spec["words"] == best["words"] and spec["template"] == f"{best['template']} {{shown:2}}"
    assert spec["source"].endswith("rows-learnt.jsonl") and spec["test"].endswith("rows-held.jsonl")
    told = json.loads((done.result / "lineage.json").read_text())
    assert sorted(told["made_of"]) == ["given", "try-words-1"]


def test_lm_bff_templates_are_written_alike_each_time_and_by_a_t5_alone(home):
    model = t5(home / "t5")
    spec = spec_of(home, home / "x", strategy=None, settings={})
    texts = [f"{text} {{0}} {word} {{1}}" for text, word in (("the moon is red", "red"), ("a cat of paris", "good"))]
    one = write_fillings(spec, str(model), texts, beams=6, most=6)
    assert one == write_fillings(spec, str(model), texts, beams=6, most=6)
    with pytest.raises(ModelError, match="written by a T5"):
        write_fillings(spec, spec.model, texts, beams=2, most=4)


def test_lm_bff_a_t5s_templates_are_tried_too(home, tmp_path, monkeypatch):
    asked = []

    def fillings(spec, model, texts, *, beams, most):
        asked.append((model, texts, beams, most))
        return [("so", "!"), ("so", "!"), ("say", "")]

    monkeypatch.setattr("luthier.workflow.recipes.write_fillings", fillings)
    given = {"lm_bff.template_model": "some t5", "lm_bff.tries": 2, "lm_bff.beams": 7, "lm_bff.shown": 0}
    done = follow(spec_of(home, tmp_path / "out", settings=given, steps=2))
    assert [name for name in done.phases if "template" in name] == ["try-template-1", "try-template-2"]
    found = [one["template"] for one in lines(done.path / "rows-tried.jsonl") if "template" in one["try"]]
    assert found == ["{text} so {mask} !", "{text} say {mask}"]
    (model, texts, beams, most), *_ = asked
    assert (model, beams, most) == ("some t5", 7, 20) and all("{0}" in t and t.endswith("{1}") for t in texts)


def test_lm_bff_without_tries_learns_all_rows_in_one_run(home, tmp_path):
    done = follow(spec_of(home, tmp_path / "out", settings={"lm_bff.tries": 0}, steps=2))
    assert list(done.phases) == ["prompt"]
    spec = RunFolder.open(done.result, write=False).spec["data"]
    assert spec["template"] == "{text} ! it is {mask} . {shown:2}" and spec["source"].endswith("few.csv")


def test_lm_bff_is_refused_without_a_template_or_words(home, tmp_path):
    for words, data in (
        ("needs a template to begin with", {"template": None, "words": None}),
        ("needs a template to begin with", {"template": "{shown} {text} {mask}"}),
        ("no word for red", {"words": "good=good, bad=bad"}),
    ):
        with pytest.raises(ConfigError, match=words):
            follow(spec_of(home, tmp_path / "out", data=data))
        assert not (tmp_path / "out").exists()

"""label_words: words of labels from the states of gaps."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from fillers import filler, t5, writer
from little import little_data, little_spec

from luthier.core import ConfigError
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.strategies.recipes.label_words import fitted, given_out, ranked
from luthier.training.recipe import Guesses
from luthier.workflow.gap_search import guess_words
from luthier.workflow.load_model import find_model, load_tokenizer
from luthier.workflow.preparation import prepare
from luthier.workflow.recipes import follow

torch.set_num_threads(1)
MODELS = {"bert": (filler, "{text} ! it is {mask} ."), "llama": (writer, "{text} ! it is {mask}"),
          "t5": (t5, "{text} ! it is {mask} .")}  # fmt: skip


def spec_of(home, out, kind="bert", **changes):
    make, template = MODELS[kind]
    rows = little_data(home / "rows.csv", rows=40)
    data = DataSpec(source=str(rows), template=template, **changes.pop("data", {}))
    given = {"model": str(make(home / kind)), "data": data, "method": "lora", "strategy": "label_words", "steps": 2}
    return little_spec(home, out=str(out), **{**given, **changes})


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def odd_labels(path):
    labels = ("good", "bad, so") * 10
    path.write_text("".join(f'{{"text": "the moon is {i}", "label": "{w}"}}\n' for i, w in enumerate(labels)))
    return path


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("label_words")


def test_label_words_of_a_planted_direction_are_found():
    draw = np.random.default_rng(2)
    vectors = draw.normal(size=(30, 32)).astype(np.float32)
    planted = [4, 11, 25]  # the states of a label lie along the vector of its word
    labels = np.arange(60) % 3
    states = (3 * vectors[planted][labels] + draw.normal(size=(60, 32))).astype(np.float32)
    vectors[planted] *= 2
    said = Guesses(chances=np.zeros((60, 30), np.float32), words={i: f"w{i}" for i in range(30)}, states=states,
                   vectors=vectors)  # fmt: skip
    words = ranked(said, *fitted(states, labels, 3, 0.01))
    assert words.shape == (3, 30) and np.allclose(np.exp(words).sum(0), 1), "chances of the labels, for each word"
    assert given_out(words) == planted
    assert given_out(np.asarray([[-1.0, -2.0], [-0.5, -3.0]])) == [1, 0], "no word twice; who is surer has it"
    assert given_out(np.zeros((2, 1))) is None


def test_label_words_the_fit_is_that_of_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=(50, 6)).astype(np.float32), draw.integers(3, size=50)
    turn, shift = fitted(x, y, 3, 0.05)
    theirs = linear.LogisticRegression(C=1 / (50 * 0.05), tol=1e-10, max_iter=5000).fit(x.astype(np.float64), y)
    np.testing.assert_allclose(turn, theirs.coef_, atol=1e-4)
    np.testing.assert_allclose(shift - shift.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4)


@pytest.mark.parametrize("kind", [*MODELS])
def test_label_words_states_and_vectors_are_what_the_logits_are_made_of(home, kind):
    spec = dataclasses.replace(spec_of(home, home / "x", kind), strategy=None)
    table = prepare(dataclasses.replace(spec, data=dataclasses.replace(spec.data, words="good=good, bad=bad, red=red")))
    said = guess_words(spec, table.test_table)
    logits = said.states @ said.vectors.T  # a bias, where there is one, is the same for all rows
    apart = said.chances - logits
    apart -= apart.mean(-1, keepdims=True)
    assert len(said.states) > 1 and np.abs(apart - apart[:1]).max() < 1e-3
    assert np.abs(said.states[0] - said.states[1]).max() > 1e-4


def test_label_words_a_run_learns_with_what_was_found_and_goes_on_alike(home):
    spec = spec_of(home, home / "done", strategy="label_words+autoprompt", method="prompt_tuning", optim=OptimSpec(),
                   settings={"length": 2, "autoprompt.candidates": 2})  # fmt: skip
    done = follow(spec)
    run = RunFolder.open(done.result, write=False).spec
    assert run["strategy"] == "autoprompt" and [*done.phases] == ["task"]
    words = dict(part.split("=") for part in run["data"]["words"].split(", "))
    assert sorted(words) == ["bad", "good", "red"] and len(set(words.values())) == 3
    tokenizer = load_tokenizer(find_model(spec.model))
    assert all(len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1 for word in words.values())
    told = {one["label"]: one for one in lines(done.path / "rows-words.jsonl")}
    assert all(words[name] in told[name]["words"] for name in words)
    (right,) = lines(done.path / "rows-fitted.jsonl")
    assert right["fit"] > 0.5 and 0 <= right["words"] <= 1
    assert follow(spec.out).result == done.result, "finished: found again, and not run again"


def test_label_words_what_cannot_be_searched_is_refused(home, tmp_path):
    for words, changes in (
        ("needs a template", {"data": {"template": None}}),
        ("label_words.most: no row of the label", {"settings": {"label_words.most": 1}}),
        ("has 0 gaps", {"data": {"template": "{text} so"}}),
        ("'bad=why' names them. Leave --words out", {"data": {"words": "bad=why"}}),
        ("the label 'bad, so' holds a comma", {"data": {"source": str(odd_labels(tmp_path / "odd.jsonl"))}}),
    ):
        spec = spec_of(home, tmp_path / "out", **{k: v for k, v in changes.items() if k != "data"})
        spec = dataclasses.replace(spec, data=dataclasses.replace(spec.data, **changes.get("data", {})))
        with pytest.raises(ConfigError, match=words):
            follow(spec)
        assert not (tmp_path / "out").exists()

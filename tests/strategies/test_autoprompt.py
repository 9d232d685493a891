"""autoprompt: words before the text are exchanged one at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from fillers import filler
from in_memory import Runs
from little import Heard, little_data, little_spec

from luthier.core import CompositionError, ConfigError
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec
from luthier.workflow import train

torch.set_num_threads(1)
WIDE = BatchSpec(size=24, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("autoprompt"))


def loop_of(runs, kind="bert-gap-dry", **values):
    values = {f"autoprompt.{k}": v for k, v in values.items()}
    loop = runs.loop("autoprompt", "prompt_tuning", kind, values=values, batch=WIDE, steps=8)
    loop.moments.start()
    ((one, course),) = loop.moments._asked
    return loop, one, course


def words_of(course):
    (slots,) = course.weights().values()
    table = course.tuned.model.get_input_embeddings().weight
    return slots, [int((table == row).all(-1).nonzero()[0]) for row in slots]


@pytest.mark.acid("autoprompt", 2)
@pytest.mark.parametrize("kind", ["bert-gap-dry", "llama-gap-dry"])
def test_autoprompt_an_exchange_that_is_kept_lowers_the_loss_on_other_rows(runs, kind):
    loop, one, course = loop_of(runs, kind, candidates=6)
    kept = 0
    for step in range(8):
        _, before = words_of(course)
        row = loop._train_step(step, loop.feed.cut(step))
        slots, after = words_of(course)
        assert after == course.memory.tensors["ids"].tolist(), "each slot is always a word"
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        assert changed == (row["autoprompt.after"] < row["autoprompt.before"])
        if before != after:
            kept += 1
            rows = one._other_rows(course, sum(len(batch.rows) for batch in loop.feed.cut(step)))
            at, table = slots.detach().clone(), course.tuned.model.get_input_embeddings().weight
            with torch.no_grad(), course.still():
                now = one._mean(course, rows)
                slots.copy_(table[before])
                then = one._mean(course, rows)
                slots.copy_(at)
            assert (now, then) == (row["autoprompt.after"], row["autoprompt.before"]) and now < then
    assert kept > 1


@pytest.mark.acid("autoprompt", 3)
def test_autoprompt_the_gradient_ranks_words_as_trying_each_of_them_does(runs):
    _, one, course = loop_of(runs, "bert-gap-dry", candidates=100)
    course.progress.step = 1
    (slots,), (batch,) = course.weights().values(), course.cut(course.rows.rows("train"))
    table = course.tuned.model.get_input_embeddings().weight
    with course.still():
        course.forward(batch).loss.backward()
        ranked = one.promising(course, slots.grad, 0)
        assert len(ranked) == len(one._allowed(course)), "the mask that stands there is none of them"
        tried = []
        with torch.no_grad():
            for i in ranked:
                slots[0] = table[i]
                tried.append(float(course.forward(batch).loss))
    places = np.argsort(np.argsort(tried))
    assert np.corrcoef(np.arange(len(ranked)), places)[0, 1] > 0.5


@pytest.mark.acid("autoprompt", 4)
def test_autoprompt_what_is_readable_comes_back_when_it_is_read(runs, monkeypatch):
    loop, one, course = loop_of(runs, candidates=5, readable=True)
    for step in range(6):
        loop._train_step(step, loop.feed.cut(step))
    tokenizer, (_, ids) = course.tokenizer, words_of(course)
    words = [i for i in ids if i not in tokenizer.all_special_ids]
    assert words and tokenizer(tokenizer.decode(words), add_special_tokens=False)["input_ids"] == words
    # A word that is written as another one is left out.
    slope = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    first = one.promising(course, slope, 0)
    inner, bad = tokenizer.decode, first[0]
    monkeypatch.setattr(type(tokenizer), "decode", lambda self, ids: "moon moon" if bad in ids else inner(ids))
    left = one.promising(course, slope, 0)
    assert bad not in left and left[:4] == first[1:]
    free = dataclasses.replace(one, readable=False)
    assert free.promising(course, slope, 0)[0] == bad


def test_autoprompt_says_what_it_found_and_learns_without_a_rate(tmp_path):
    data = DataSpec(
        source=str(little_data(tmp_path / "rows.csv")),
        template="{text} ! it is {mask} .",
        words="good=good, bad=bad, red=red",
    )
    given = {"model": str(filler(tmp_path / "filler")), "data": data, "settings": {"length": 2}, "optim": OptimSpec()}
    spec = little_spec(tmp_path, "prompt_tuning", strategy="autoprompt", **{**given, "steps": 3})
    heard = Heard()
    train(spec, listener=heard)
    assert "autoprompt found: " in heard.text
    no_gap = dataclasses.replace(
        spec, data=dataclasses.replace(data, template=None, words=None), out=str(tmp_path / "no")
    )
    with pytest.raises(ConfigError, match="cannot ask for a label without a gap"):
        train(no_gap)
    with pytest.raises(CompositionError, match="Use --method prompt_tuning"):
        train(dataclasses.replace(spec, method="lora", settings={}, out=str(tmp_path / "no")))

"""pouf: rows without labels and the labels' words are drawn to each other."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from in_memory import Runs, same

from luthier.core import CompositionError, ConfigError
from luthier.runs.spec import BatchSpec
from luthier.strategies.loss.pouf import balance
from luthier.training import STRATEGIES
from luthier.training.course import Piece

torch.set_num_threads(1)
POUF = STRATEGIES.get("pouf")
WIDE = BatchSpec(size=6, tokens=4096)
KINDS = ("bert-gap-dry", "llama-gap-dry", "t5-gap-dry")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("pouf"))


def a_step(runs, kind, labels=lambda y: y, **values):
    loop = runs.loop("pouf", "full", kind, values={f"pouf.{k}": v for k, v in values.items()}, batch=WIDE)
    loop.moments.start()
    ((one, course),) = loop.moments._asked
    (batch,) = loop.feed.cut(0)
    batch = dataclasses.replace(batch, labels=labels(batch.labels))
    piece = Piece(batch=batch, index=0, n_targets=batch.n_targets)
    return loop, course, one.loss(course, piece, lambda: course.forward(batch))


@pytest.mark.acid("pouf", 1)
@pytest.mark.parametrize("kind", KINDS)
def test_pouf_other_labels_and_none_change_nothing(runs, kind):
    *_, own = a_step(runs, kind)
    *_, others = a_step(runs, kind, lambda y: (y + 1) % 3)
    *_, none = a_step(runs, kind, lambda y: None)
    assert torch.equal(own.loss, others.loss) and torch.equal(own.loss, none.loss)
    assert not torch.equal(a_step(runs, kind, labelled=1.0)[-1].loss, own.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_pouf_is_its_formula(runs, kind):
    loop, course, result = a_step(runs, kind, sharpness=3.0)
    with course.gap_states() as seen:
        logits = course.forward(loop.feed.cut(0)[0]).logits
    table = course.tuned.model.get_output_embeddings().weight
    words = torch.tensor(course.task.word_ids)
    torch.testing.assert_close(seen.words, table[words])
    scale = 1.0 if not kind.startswith("t5") else float((logits / (seen.states @ seen.words.T)).median().detach())
    bias = getattr(course.tuned.model.get_output_embeddings(), "bias", None)
    torch.testing.assert_close(logits, scale * seen.states @ seen.words.T + (0 if bias is None else bias[words]))
    v, w = (x / x.norm(dim=-1, keepdim=True) for x in (seen.states, seen.words))
    s = (v @ w.T).tolist()
    n, c = len(s), len(s[0])
    there = [sum((1 - x) * math.exp(3 * x) for x in row) / sum(math.exp(3 * x) for x in row) for row in s]
    back = []
    for k in range(c):
        column = [row[k] for row in s]
        back.append(sum((1 - x) * math.exp(3 * x) for x in column) / sum(math.exp(3 * x) for x in column))
    p = logits.softmax(-1).detach().double().numpy()
    unsure = -(p * np.log(p)).sum(-1).mean() + (p.mean(0) * np.log(p.mean(0))).sum()
    wanted = n * (sum(there) / n + sum(back) / c + 0.6 * unsure)
    assert float(result.loss.detach()) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.acid("pouf", 2)
def test_pouf_the_least_of_both_losses():
    assert float(balance(torch.eye(4).repeat(3, 1))) == pytest.approx(-math.log(4))
    assert float(balance(torch.eye(4)[[0, 0, 0]])) == 0.0, "one answer for all"
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        p = torch.randn(8, 4, generator=draw).mul(3).softmax(-1)
        assert -math.log(4) < float(balance(p)) < 0
    rows = torch.eye(5)  # each row on a word of its own
    found = [float(POUF(sharpness=t).moved(rows)) for t in (1.0, 5.0, 20.0, 80.0)]
    assert found == sorted(found, reverse=True) and found[-1] < 1e-6


@pytest.mark.acid("pouf", 3)
@pytest.mark.parametrize("kind", ["bert-gap-dry-tied", "llama-gap-dry-tied"])
def test_pouf_trunk_and_words_get_gradients(runs, kind):
    _, course, result = a_step(runs, kind)
    result.loss.backward()
    words = torch.tensor(course.task.word_ids)
    table = course.tuned.model.get_output_embeddings().weight
    assert table.grad[words].abs().sum(-1).gt(0).all()
    blocks = [p.grad for n, p in course.tuned.model.named_parameters() if ".0." in n and "weight" in n]
    assert blocks and all(g is not None and g.any() for g in blocks)


@pytest.mark.acid("pouf", 4)
def test_pouf_a_step_of_one_row_is_refused_and_none_comes_at_the_end(runs):
    with pytest.raises(ConfigError, match=r"batch\.size is 1"):
        runs.loop("pouf", "full", "bert-gap", batch=BatchSpec(size=1))
    loop = runs.loop("pouf", "full", "bert-gap", batch=WIDE)
    order = loop.feed.batches.order
    n = len(loop.feed.batches.examples)
    assert n % 6 == 1, "the last step would have one row"
    for epoch in range(3):
        sizes = [len(set(order.rows(epoch, step).tolist())) for step in range(order.steps_per_epoch)]
        assert sorted(sizes) == [2, *[6] * (n // 6)]


def test_pouf_nobody_beside_it_reads_labels_and_a_run_resumes(runs):
    with pytest.raises(CompositionError, match="no label is read"):
        runs.loop("pouf+focal", kind="bert-gap", batch=WIDE)
    given = {"steps": 4, "batch": WIDE}
    whole = runs.after("pouf+llrd", "lora", "bert-gap", **given)
    assert same(runs.resumed(2, "pouf+llrd", "lora", "bert-gap", **given), whole)

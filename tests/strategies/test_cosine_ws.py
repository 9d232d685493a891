"""cosine_ws: labels first, then sure answers of a copy of itself."""

import dataclasses
import math

import pytest
import torch
from in_memory import Runs

from luthier.core import CompositionError
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.training.course import Piece

torch.set_num_threads(1)
CosineWS = STRATEGIES.get("cosine_ws")
WIDE = BatchSpec(size=8, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("cosine_ws"))


def mine(loop):
    ((one, course),) = [(s, c) for s, c in loop.moments._asked if s.name == "cosine_ws"]
    return one, course


@pytest.mark.acid("cosine_ws", 1)
def test_cosine_ws_how_sure_is_one_of_a_certain_row_and_nothing_of_a_uniform_one():
    p = torch.tensor([[1.0, 0, 0], [1 / 3] * 3, [0.7, 0.2, 0.1]])
    soft, sure = CosineWS().soft(p)
    torch.testing.assert_close(sure[:2], torch.tensor([1.0, 0.0]), atol=1e-6, rtol=0)
    entropy = -sum(x * math.log(x) for x in (0.7, 0.2, 0.1))
    assert sure[2].item() == pytest.approx(1 - entropy / math.log(3), rel=1e-5)
    everyone = torch.softmax(5 * torch.randn(200, 6), -1)
    soft, sure = CosineWS().soft(everyone)
    assert sure.min() >= 0 and sure.max() <= 1
    torch.testing.assert_close(soft.sum(-1), torch.ones(200))
    by_hand = everyone[7] ** 2 / everyone.sum(0)
    torch.testing.assert_close(soft[7], by_hand / by_hand.sum())


def test_cosine_ws_the_loss_computed_by_hand():
    wanted = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
    sure, f = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.25, 0.75]])
    states = torch.tensor([[1.0, 0], [0, 2.0], [3.0, 0]])
    kl = (wanted * (wanted / f).log()).sum(-1).tolist()
    flat = [sum(0.5 * math.log(0.5 / q) for q in qs) for qs in f.tolist()]
    rows = sum(w * k + 0.1 * u for w, k, u in zip(sure.tolist(), kl, flat, strict=True)) / 3
    # Pairs: 0 and 1 share a label at distance 1; 0 and 2 are of two at 0; 1 and 2 of two at 1.
    pairs = (1.0 + 1.0 + 0.0) / 3
    assert CosineWS().learnt(wanted, sure, f.log(), states).item() == pytest.approx(rows + pairs, rel=1e-5)


@pytest.mark.acid("cosine_ws", 2)
def test_cosine_ws_drawing_states_has_a_gradient_on_the_blocks_of_the_model_itself(runs):
    found = {}
    for weight in (0.0, 1.0):
        values = {"cosine_ws.init": 0.0, "cosine_ws.threshold": 0.0, "cosine_ws.contrast": weight}
        loop = runs.loop("cosine_ws", "full", "bert-dry", values=values, batch=WIDE)
        loop.moments.start()
        one, course = mine(loop)
        course.progress.step, course.progress.total = 1, 10
        batch = loop.feed.cut(0)[0]
        one.loss(
            course, Piece(batch=batch, index=0, n_targets=8), lambda c=course, b=batch: c.forward(b)
        ).loss.backward()
        found[weight] = {n: p.grad.clone() for n, p in course.weights().items() if p.grad is not None}
    query = [n for n in found[1.0] if "layer.0.attention.self.query.weight" in n]
    assert query and all(not torch.allclose(found[0.0][n], found[1.0][n], rtol=1e-2, atol=1e-9) for n in query)


@pytest.mark.acid("cosine_ws", 3)
def test_cosine_ws_a_threshold_of_one_keeps_nothing_and_moves_nothing(runs):
    values = {"cosine_ws.init": 0.0, "cosine_ws.threshold": 1.0}
    loop = runs.loop("cosine_ws", "full", "bert-dry", values=values, batch=WIDE)
    loop.moments.start()
    one, course = mine(loop)
    course.progress.step, course.progress.total = 1, 10
    batch = loop.feed.cut(0)[0]
    loss = one.loss(course, Piece(batch=batch, index=0, n_targets=8), lambda: course.forward(batch)).loss
    loss.backward()
    assert loss.item() == 0 and loop.moments.numbers()["cosine_ws.kept"] == 0
    grads = [p.grad for p in course.weights().values() if p.grad is not None]
    assert grads and all(not g.any() for g in grads)


@pytest.mark.acid("cosine_ws", 4)
def test_cosine_ws_the_copy_changes_only_every_so_many_steps(runs, monkeypatch):
    loop = runs.loop(
        "cosine_ws", "lora", "bert-dry", steps=10, batch=WIDE,
        values={"cosine_ws.init": 0.2, "cosine_ws.refresh": 3, "cosine_ws.threshold": 0.0},
    )  # fmt: skip
    copies, weights = [], []

    def noted(self, course):
        copies.append({n: t.clone() for n, t in course.memory.tensors.items()})
        weights.append({n: p.detach().clone() for n, p in course.weights().items()})

    monkeypatch.setattr(CosineWS, "after_step", noted)
    loop.run_to()
    assert len(copies) == 10
    moved = [k + 1 for k in range(1, 10) if any(not torch.equal(copies[k][n], t) for n, t in copies[k - 1].items())]
    assert moved == [3, 6, 9]  # steps 1 and 2 learn labels; the first copy is of what they made
    assert all(torch.equal(t, weights[1][n]) for n, t in copies[2].items())


def test_cosine_ws_nobody_beside_it_reads_labels_and_what_weighs_them_at_first_may(runs):
    for beside in ("cosine_ws+scl", "scl+cosine_ws", "cosine_ws+data_select"):
        with pytest.raises(CompositionError, match="would read labels after the first steps"):
            runs.loop(beside, "lora", "bert-dry", batch=WIDE)
    runs.after("cosine_ws+class_weights+llrd", "lora", "bert-dry", steps=3, batch=WIDE)


def test_cosine_ws_reads_no_label_after_the_first_steps(runs):
    found = []
    for shift in (0, 1):
        loop = runs.loop("cosine_ws", "lora", "bert-dry", steps=4, batch=WIDE, values={"cosine_ws.init": 0.0})
        loop.moments.start()
        one, course = mine(loop)
        course.progress.step, course.progress.total = 1, 10
        batch = loop.feed.cut(0)[0]
        batch = dataclasses.replace(batch, labels=(batch.labels + shift) % 3)
        found.append(one.loss(course, Piece(batch=batch, index=0, n_targets=8), lambda c=course, b=batch: c.forward(b)))
    assert not torch.equal(found[0].labels, found[1].labels) and torch.equal(found[0].loss, found[1].loss)

"""uda: rows without labels are answered alike, whole and with words missing."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs

from luthier.core import CompositionError
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.training.course import Piece

torch.set_num_threads(1)
UDA = STRATEGIES.get("uda")
WIDE = BatchSpec(size=6, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("uda"))


def a_step(runs, shift=0, **values):
    """The strategy, its view, a step's batch whose further rows have other labels by `shift`, and its loss."""
    values = {f"uda.{k}": v for k, v in {"ratio": 1.0, "sure": 0.0, **values}.items()}
    loop = runs.loop("uda", "full", "bert-dry", values=values, batch=WIDE)
    loop.moments.start()
    ((one, course),) = [(s, c) for s, c in loop.moments._asked if s.name == "uda"]
    course.progress.step, course.progress.total = 1, 10
    (batch,) = loop.feed.cut(0)
    other = torch.from_numpy(course.rows.numbers(batch.rows)) == 1
    assert other.sum() == (~other).sum() == 6
    batch = dataclasses.replace(batch, labels=torch.where(other, (batch.labels + shift) % 3, batch.labels))
    piece = Piece(batch=batch, index=0, n_targets=batch.n_targets)
    return one, course, batch, other, one.loss(course, piece, lambda: course.forward(batch)).loss


@pytest.mark.acid("uda", 1)
def test_uda_no_gradient_reaches_what_is_compared_with_and_no_label_is_read(runs):
    one, course, batch, other, loss = a_step(runs, temperature=0.5, delete=0.5)
    with torch.no_grad():
        whole = course.forward(batch).logits
    keeps = one.kept_words(course, Piece(batch=batch, index=0, n_targets=12), other)
    assert keeps[~other].all() and not keeps[other].all() and keeps[:, 0].all()
    with course.embedding(lambda e: e * keeps):
        changed = course.forward(batch).logits
    # The same with the clean side as a constant: value and gradient are equal.
    ce = F.cross_entropy(changed[~other], batch.labels[~other], reduction="sum") * 12 / 6
    wanted = (whole[other] / 0.5).softmax(-1)
    by_hand = ce + F.kl_div(F.log_softmax(changed[other], -1), wanted, reduction="sum") * 12 / 6
    torch.testing.assert_close(loss, by_hand)
    weights = [p for p in course.weights().values() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x, weights, allow_unused=True) for x in (loss, by_hand))
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, atol=1e-6))
    assert torch.equal(a_step(runs, shift=1, temperature=0.5, delete=0.5)[-1], loss), "labels of further rows"


@pytest.mark.acid("uda", 2)
def test_uda_rows_that_are_held_out_count_exactly_nothing(runs, monkeypatch):
    logits, changed = torch.tensor([[9.0, 0, 0], [0.1, 0, 0]]), torch.randn(2, 3, requires_grad=True)
    each, sure = UDA(sure=0.8).apart(logits, changed)
    assert sure.tolist() == [True, False] and each[1] == 0 and each[0] > 0
    each.sum().backward()
    assert not changed.grad[1].any() and changed.grad[0].any()
    *_, nobody = a_step(runs, sure=1.0)
    _, course, batch, other, _ = a_step(runs)
    alone = F.cross_entropy(course.forward(batch).logits[~other], batch.labels[~other], reduction="sum")
    torch.testing.assert_close(nobody, alone * 2)
    # Of labelled rows, those above the bound: here one that half of them pass.
    q = course.forward(batch).logits.softmax(-1)[~other].gather(1, batch.labels[~other, None])[:, 0].detach()
    bound = float(q.median()) + 1e-7
    monkeypatch.setattr(UDA, "bound", lambda self, t, labels: bound)
    *_, held = a_step(runs, sure=1.0)
    assert 0 < (q <= bound).sum() < 6
    torch.testing.assert_close(held, -(q.log() * (q <= bound)).sum() * 2)


@pytest.mark.acid("uda", 3)
@pytest.mark.parametrize("anneal", ["linear", "log", "exp"])
def test_uda_the_threshold_goes_from_one_in_c_to_one(anneal):
    found = [UDA(anneal=anneal).bound(t / 20, 4) for t in range(21)]
    assert found == sorted(found) and found[0] == pytest.approx(0.25, abs=0.006)
    assert found[-1] == pytest.approx(1, abs=0.006)
    middle = found[10] - 0.625
    assert {"linear": abs(middle) < 1e-9, "log": middle > 0.1, "exp": middle < -0.1}[anneal]
    assert UDA().bound(0.0, 4) == 1.0


@pytest.mark.acid("uda", 4)
def test_uda_nothing_is_lost_where_nothing_is_changed(runs):
    whole = a_step(runs, delete=0.0, temperature=1.0)[-1]
    labelled = a_step(runs, delete=0.0, temperature=1.0, weight=0.0)[-1]
    assert whole.item() == pytest.approx(labelled.item(), abs=1e-5)
    assert a_step(runs, delete=0.5, temperature=1.0)[-1] > a_step(runs, delete=0.5, temperature=1.0, weight=0.0)[-1]


def test_uda_nobody_beside_it_reads_labels_that_are_none(runs):
    for beside in ("scl", "focal", "data_select"):
        with pytest.raises(CompositionError, match="would read the labels of rows that have none"):
            runs.loop(f"uda+{beside}", kind="bert-dry", batch=WIDE)
    assert runs.after("uda+llrd", "full", "bert-dry", steps=2, batch=WIDE)

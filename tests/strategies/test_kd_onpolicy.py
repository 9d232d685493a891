"""kd_onpolicy: the student writes, and the teacher says what it would have said."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from in_memory import Runs

from luthier.core import CompositionError, ConfigError
from luthier.data.examples import IGNORED
from luthier.runs.spec import BatchSpec
from luthier.training import STRATEGIES
from luthier.training.course import Piece
from luthier.training.written import answered_anew

torch.set_num_threads(1)
KD = STRATEGIES.get("kd_onpolicy")
WIDE = BatchSpec(size=6, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("kd_onpolicy"))


def view_of(runs, **values):
    values = {f"kd_onpolicy.{k}": v for k, v in {"new_tokens": 4, "share": 1.0, **values}.items()}
    loop = runs.loop("kd_onpolicy", "full", "llama-dry", values=values, batch=WIDE)
    loop.moments.start()
    ((one, course),) = loop.moments._asked
    course.progress.step = 1
    return one, course, loop.feed.cut(0)[0]


@pytest.mark.acid("kd_onpolicy", 1)
def test_kd_onpolicy_both_ends_are_the_two_divergences():
    p, q = torch.randn(4, 9).double(), torch.randn(4, 9).double()
    lp, lq = (F.log_softmax(z.float() / 0.9, -1) for z in (p, q))
    torch.testing.assert_close(KD(beta=0.0).apart(p, q), (lp.exp() * (lp - lq)).sum())
    torch.testing.assert_close(KD(beta=1.0).apart(p, q), (lq.exp() * (lq - lp)).sum())
    m = 0.3 * lp.exp() + 0.7 * lq.exp()
    by_hand = 0.3 * (lp.exp() * (lp - m.log())).sum() + 0.7 * (lq.exp() * (lq - m.log())).sum()
    torch.testing.assert_close(KD(beta=0.3).apart(p, q), by_hand)


@pytest.mark.acid("kd_onpolicy", 2, 3)
def test_kd_onpolicy_in_the_middle_it_is_the_same_both_ways_and_nothing_for_equals():
    p, q = torch.randn(4, 9), torch.randn(4, 9)
    torch.testing.assert_close(KD(beta=0.5).apart(p, q), KD(beta=0.5).apart(q, p))
    for beta in (0.0, 0.2, 0.5, 1.0):
        assert abs(float(KD(beta=beta).apart(p, p))) < 1e-5


@pytest.mark.acid("kd_onpolicy", 4, 6)
def test_kd_onpolicy_answers_of_the_rows_are_not_read_and_prompts_carry_no_loss(runs):
    one, course, batch = view_of(runs)
    told = batch.labels != IGNORED
    ids = batch.inputs["input_ids"]
    changed = {**batch.inputs, "input_ids": torch.where(told, (ids + 5) % 20 + 6, ids)}
    other = dataclasses.replace(batch, inputs=changed, labels=torch.where(told, changed["input_ids"], batch.labels))
    (own,), (same) = one.batches(course, [batch]), one.batches(course, [other])
    assert torch.equal(own.inputs["input_ids"], same[0].inputs["input_ids"]) and torch.equal(own.labels, same[0].labels)
    begins = told.int().argmax(-1)
    for k, begin in enumerate(begins.tolist()):
        assert torch.equal(own.inputs["input_ids"][k, :begin], batch.inputs["input_ids"][k, :begin])
        assert (own.labels[k, :begin] == IGNORED).all() and 0 < (own.labels[k] != IGNORED).sum() <= 4
    assert own.n_targets == int((own.labels != IGNORED).sum())


@pytest.mark.acid("kd_onpolicy", 5)
def test_kd_onpolicy_no_gradient_goes_through_what_was_drawn(runs):
    one, course, batch = view_of(runs)
    (own,) = one.batches(course, [batch])
    assert not own.inputs["input_ids"].is_floating_point() and all(p.grad is None for p in course.weights().values())
    with torch.no_grad():
        for p in course.weights().values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    grads = []
    for piece_batch in (own, dataclasses.replace(own, inputs={n: t.clone() for n, t in own.inputs.items()})):
        piece = Piece(batch=piece_batch, index=0, n_targets=own.n_targets)
        loss = one.loss(course, piece, lambda b=piece_batch: course.forward(b)).loss
        grads.append(torch.autograd.grad(loss, list(course.weights().values()), allow_unused=True))
    assert any(g is not None and g.any() for g in grads[0])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(*grads, strict=True)), "as of constants"


def test_kd_onpolicy_draws_follow_the_models_chances_and_are_named_by_step_and_row(runs):
    _, course, batch = view_of(runs)
    single = dataclasses.replace(
        batch, inputs={n: t[:1] for n, t in batch.inputs.items()}, labels=batch.labels[:1], rows=batch.rows[:1]
    )
    whole = answered_anew(course, batch, most=4, temperature=0.9)
    alone = answered_anew(course, single, most=4, temperature=0.9)
    n = int(alone.inputs["attention_mask"].sum())
    assert torch.equal(alone.inputs["input_ids"][0, :n], whole.inputs["input_ids"][0, :n]), "whoever stands beside"
    begin = int((single.labels != IGNORED).int().argmax(-1))
    with torch.no_grad():
        chances = course.tuned.model(single.inputs["input_ids"][:, :begin]).logits[0, -1].softmax(-1)
    drawn = torch.zeros(len(chances))
    for step in range(400):
        course.progress.step = step
        found = answered_anew(course, single, most=1, temperature=1.0)
        drawn[int(found.inputs["input_ids"][0, begin])] += 1 / 400
    assert 0.5 * float((drawn - chances).abs().sum()) < 0.3, "total variation of 400 draws"
    assert 0.5 * float((drawn - chances.roll(1)).abs().sum()) > 0.5 * float((drawn - chances).abs().sum())


def test_kd_onpolicy_with_no_share_it_takes_the_rows_and_what_cannot_work_is_refused(runs):
    one, course, batch = view_of(runs, share=0.0)
    assert one.batches(course, [batch])[0] is batch
    with pytest.raises(ConfigError, match="writes on from prompts"):
        runs.loop("kd_onpolicy", kind="bert")
    with pytest.raises(CompositionError, match="stands in its place"):
        runs.loop("kd_onpolicy+focal", kind="llama")


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_kd_onpolicy_is_the_loss_of_trl_on_the_same_logits(monkeypatch, beta):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    from trl.experimental.gkd import GKDTrainer

    draw = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(2, 5, 11, generator=draw) for _ in range(2))
    student.requires_grad_()
    labels = torch.randint(11, (2, 5), generator=draw)
    labels[0, :3] = labels[1, 0] = IGNORED
    told, given = labels != IGNORED, {"beta": beta, "temperature": 0.9}
    for reduction, divisor in (("sum", 1), ("batchmean", int(told.sum()))):
        theirs = GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, reduction=reduction, **given)
        ours = KD(**given).apart(teacher[told], student[told]) / divisor
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-5)
    assert slopes[0][told].any() and not slopes[0][~told].any()

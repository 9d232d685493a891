"""Acid tests of the catalogue for smart."""

import pytest
import torch
from in_memory import Runs

from luthier.runs.spec import BatchSpec

torch.set_num_threads(1)
ONE = BatchSpec(size=6, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("smart"))


def begun(runs, **settings):
    loop = runs.loop("smart", "lora", "bert-dry", values={f"smart.{k}": v for k, v in settings.items()}, batch=ONE)
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, loop.total, 0)
    for p in loop.tuned.trained().values():
        with torch.no_grad():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return loop, *loop.moments._asked[0]


@pytest.mark.acid("smart", 1)
def test_without_a_change_the_answer_does_not_change_and_with_one_it_does(runs):
    for step, sigma in ((0.0, 0.0), (1e-2, 1e-3)):
        loop, _, course = begun(runs, step=step, sigma=sigma, near=0.0)
        loop._gradients(0, loop.feed.cut(0))
        rough = course.progress.numbers["smart.rough"]
        assert rough > 1e-9 if step else abs(rough) < 1e-12


@pytest.mark.acid("smart", 2)
def test_the_change_stays_in_its_bound_and_off_the_padding(runs):
    loop, one, course = begun(runs, step=1e-2, sigma=1e-5)
    loop._gradients(0, loop.feed.cut(0))
    piece = loop.moments._piece
    clean = loop.objective(piece.batch).logits.detach()
    delta = one.climbed(course, piece, clean)
    mask = piece.batch.inputs["attention_mask"].bool()
    assert not delta[~mask].any()
    assert 0.009 < delta.abs().max() < 1e-2 + 6e-5 and (delta.abs().amax((1, 2)) > 0.009).all()
    far = [one._distance(course, one._answer(course, piece, d), clean) for d in (delta, -0.1 * delta)]
    assert far[0] > far[1], "it climbs"


@pytest.mark.acid("smart", 3)
def test_smoothness_has_a_gradient_on_the_weights_and_none_is_kept_of_the_climb(runs):
    loop, one, course = begun(runs, step=1e-2, near=0.0, smooth=1000.0)
    plain, _, _ = begun(runs, smooth=0.0, near=0.0)
    for each in (loop, plain):
        each._gradients(0, each.feed.cut(0))
    grads = [{n: p.grad for n, p in each.tuned.trained().items() if p.grad is not None} for each in (loop, plain)]
    assert any(not torch.allclose(g, grads[1][n], atol=1e-6) for n, g in grads[0].items())
    assert not course.memory.tensors[next(iter(course.memory.tensors))].requires_grad
    assert one.smooth == 1000.0


@pytest.mark.acid("smart", 5)
def test_the_average_of_weights_is_its_formula_and_gets_no_gradient(runs):
    loop, one, course = begun(runs, beta=0.9)
    before = {n: t.clone() for n, t in course.memory.tensors.items()}
    one.after_step(course)
    for name, p in loop.tuned.trained().items():
        assert torch.allclose(course.memory.tensors[name], 0.9 * before[name] + 0.1 * p.detach(), atol=1e-7)
    loop._gradients(0, loop.feed.cut(0))
    assert not one._answer_of_average(course, loop.moments._piece).requires_grad

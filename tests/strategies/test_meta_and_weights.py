"""maml and loss_weighting: derivatives against autograd's own, rows apart, weights that follow their equations."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from in_memory import Runs, same
from little import little_data, little_spec

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec, OptimSpec
from luthier.strategies.gradient.maml import MAML, _tasks
from luthier.strategies.mixture.loss_weighting import averaged, balanced
from luthier.workflow import train

torch.set_num_threads(1)
WHOLE = BatchSpec(size=8, tokens=4096)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("meta"))


# --- maml


def meta(settings, loss_of, start, tasks=1):
    """The gradient that maml leaves in one tensor x, where `loss_of(row, x)` is the loss of a row."""
    x = torch.nn.Parameter(start.clone())
    optimiser = SimpleNamespace(named={"x": x}, zero_grad=lambda: setattr(x, "grad", None))
    course = SimpleNamespace(
        optimiser=optimiser, device=torch.device("cpu"), generator=lambda *_: torch.Generator().manual_seed(0),
        rows=SimpleNamespace(numbers=lambda rows: np.asarray(rows) // 10), tuned=SimpleNamespace(
            state=SimpleNamespace(mask_gradients=lambda: None)),
    )  # fmt: skip
    rows = np.array([10 * t + k for t in range(tasks) for k in range(2)])
    halves = _tasks(course, rows)
    batches = [SimpleNamespace(rows=half, n_targets=1) for task in halves for half in task]
    MAML(**settings).gradient(course, batches, lambda _, batch: loss_of(int(batch.rows[0]), x))
    assert torch.equal(x.detach(), start), "the outer numbers are where they were"
    return x.grad, halves


@pytest.mark.acid("maml", 1, 4)
def test_mamls_gradient_carries_the_factor_and_the_first_order_one_does_not():
    # L = (x - c)^2 / 2 for support and query alike: phi = x - a (x - c), dL(phi)/dx = (1 - a) (phi - c)
    def quadratic(row, x):
        return (x - 3.0).square().sum() / 2

    start, a = torch.tensor([1.0]), 0.1
    phi = 1.0 - a * (1.0 - 3.0)
    first, _ = meta({"inner_lr": a}, quadratic, start)
    second, _ = meta({"inner_lr": a, "derivative": "second"}, quadratic, start)
    assert first.item() == pytest.approx(phi - 3.0) and second.item() == pytest.approx((1 - a) * (phi - 3.0))


def test_three_inner_steps_are_differentiated_as_autograd_would():
    torch.manual_seed(0)
    start, mix = torch.randn(4), torch.randn(30, 4, 4)

    def rough(row, x):
        return torch.tanh(mix[row] @ x).square().sum() + 0.1 * (x**4).sum()

    found, tasks = meta({"inner": 3, "inner_lr": 0.05, "derivative": "second"}, rough, start, tasks=2)
    x = start.clone().requires_grad_(True)
    outer = 0.0
    for support, query in tasks:
        phi = x
        for _ in range(3):
            (slope,) = torch.autograd.grad(rough(int(support[0]), phi), phi, create_graph=True)
            phi = phi - 0.05 * slope
        outer = outer + rough(int(query[0]), phi) / 2
    assert torch.allclose(found, torch.autograd.grad(outer, x)[0], atol=1e-5)


def test_the_second_derivative_of_a_model_agrees_with_a_difference(runs):
    def gradient(by=0.0, **settings):
        loop = runs.loop("maml", "lora", "bert-dry", values={f"maml.{k}": v for k, v in settings.items()}, batch=WHOLE)
        loop.moments.start()
        loop.set_mode(training=True)
        loop.moments.before_step(0, loop.total, 0)
        generator = torch.Generator().manual_seed(1)
        along = {n: torch.randn(p.shape, generator=generator) for n, p in loop.optimiser.named.items()}
        with torch.no_grad():
            for n, p in loop.optimiser.named.items():
                p.add_(along[n], alpha=by)
        losses = loop._gradients(0, loop.moments.batches(loop.feed.cut(0)))
        return sum(losses), sum(float((p.grad * along[n]).sum()) for n, p in loop.optimiser.named.items())

    given = {"inner": 2, "inner_lr": 0.5}
    h = 2e-4
    wanted = (gradient(h, **given)[0] - gradient(-h, **given)[0]) / (2 * h)
    second, first = gradient(derivative="second", **given)[1], gradient(**given)[1]
    assert second == pytest.approx(wanted, rel=0.03) and abs(first - wanted) > 3 * abs(second - wanted)


@pytest.mark.acid("maml", 2, 3)
def test_support_and_query_are_disjoint_and_no_inner_step_is_training_on_the_query(runs):
    loop = runs.loop("maml", "lora", "bert-dry", values={"maml.inner": 0}, batch=WHOLE)
    loop.moments.start()
    loop.set_mode(training=True)
    loop.moments.before_step(0, loop.total, 0)
    course, rows = loop.moments._asked[0][1], np.concatenate([b.rows for b in loop.feed.cut(0)])
    tasks = _tasks(course, rows)
    assert len(tasks) == 2 and all(len(s) and len(q) and not set(s) & set(q) for s, q in tasks)
    assert sorted(np.concatenate([r for task in tasks for r in task])) == sorted(set(rows))
    loop._gradients(0, loop.moments.batches(loop.feed.cut(0)))
    found = {n: p.grad.clone() for n, p in loop.optimiser.named.items()}
    loop.optimiser.zero_grad()
    for _, query in tasks:
        for batch in course.cut(query):
            (loop._loss(0, 0, batch) / len(query) / 2).backward()
    assert all(
        torch.allclose(found[n], p.grad, atol=1e-6) for n, p in loop.optimiser.named.items() if p.grad is not None
    )


def test_mamls_head_alone_moves_inside_and_too_few_rows_are_refused(runs, tmp_path):
    given = {"values": {"maml.adapts": "head", "maml.derivative": "second"}, "batch": WHOLE, "steps": 4}
    assert same(runs.resumed(2, "maml", "lora", **given), runs.after("maml", "lora", **given))
    old = little_data(tmp_path / "old.csv", rows=20, seed=7)
    spec = little_spec(runs.home, strategy="maml", also=(f"old={old}",), out=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"batch.size 3: maml needs a support and a query row of each of 2 sets"):
        train(dataclasses.replace(spec, batch=BatchSpec(size=3)))


# --- loss_weighting


@pytest.mark.acid("loss_weighting", 1, 2, 4)
@pytest.mark.parametrize("size", [0.3, 3.0])
def test_at_the_optimum_a_weighted_loss_is_a_half_however_large_the_loss(size, runs):
    loop = runs.loop("loss_weighting", batch=WHOLE, optim=OptimSpec(lr=1e-8, weight_decay=0.5))
    loop.moments.start()
    one, course = loop.moments._asked[0]
    s = course.numbers["s"]
    with torch.no_grad():
        s.copy_(torch.tensor([math.log(2 * size), 0.0]))
    batches = loop.moments.batches(loop.feed.cut(0))
    anchor = next(iter(loop.optimiser.named.values()))
    losses = one.gradient(course, batches, lambda k, b: size * b.n_targets + 0.0 * anchor.sum())
    assert all(float(part) == pytest.approx(size) for part in losses)
    assert s.grad[0].item() == pytest.approx(0.0, abs=1e-6), "exp(-s) L = 1/2"
    assert s.grad[1].item() == pytest.approx(0.5 - size, abs=1e-6)
    decays = {n: loop.optimiser._pace(n, 1.0)[1] for n in loop.optimiser.named}
    assert decays["loss_weighting/s"] == 0 < max(decays.values())


@pytest.mark.acid("loss_weighting", 3)
def test_weights_of_dwa_add_up_and_follow_what_falls_slowly():
    weights = averaged([0.9, 0.5, 0.7], [1.0, 1.0, 1.0], 2.0)
    assert sum(weights) == pytest.approx(3.0) and weights[0] > weights[2] > weights[1]
    assert averaged([9.0, 0.5], [10.0, 1.0], 2.0) == averaged([0.9, 0.5], [1.0, 1.0], 2.0), "a loss's size is absorbed"


def test_gradnorm_evens_out_norms_and_keeps_the_sum():
    weights = [1.0, 1.0]
    for _ in range(400):
        weights = balanced(weights, [4.0, 1.0], [0.5, 0.5], [1.0, 1.0], 1.5, 0.002)
        assert sum(weights) == pytest.approx(2.0)
    assert weights[0] * 4.0 == pytest.approx(weights[1] * 1.0, rel=0.05)
    slow = balanced([1.0, 1.0], [1.0, 1.0], [0.9, 0.5], [1.0, 1.0], 1.5, 0.01)
    assert slow[0] > 1 > slow[1], "a set that falls slowly is pulled harder"


def test_weights_of_sets_without_a_loss_are_numbers_and_those_of_others_go_on():
    assert averaged([0.0, 0.0], [0.0, 0.0], 2.0) == [1.0, 1.0]
    nothing = balanced([1.2, 0.8], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0], 1.5, 0.025)
    assert nothing == pytest.approx([1.2, 0.8])
    one = balanced([1.0, 1.0], [0.0, 1.0], [0.0, 0.5], [1.0, 1.0], 1.5, 0.01)
    assert sum(one) == pytest.approx(2.0) and one[0] < 1.0 < one[1]


@pytest.mark.acid("loss_weighting", 4)
@pytest.mark.parametrize("form", ["dwa", "gradnorm"])
def test_weights_move_are_logged_and_last(form, runs):
    given = {"values": {"loss_weighting.form": form}, "batch": WHOLE, "steps": 40}
    loop = runs.after("loss_weighting", "ia3", **given)
    rows = [row for row in loop.run.rows if row["event"] == "step"]
    found = [(row["loss_weighting.weight.train"], row["loss_weighting.weight.old"]) for row in rows]
    assert found[0] == (1.0, 1.0) and found[-1] != (1.0, 1.0)
    assert all(sum(pair) == pytest.approx(2.0) for pair in found)
    assert same(runs.resumed(27, "loss_weighting", "ia3", **given), loop)

"""The acid tests of first-order meta-learning."""

import pytest
import torch
from in_memory import Runs

from luthier.runs.spec import BatchSpec

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("reptile"))


def begun(runs, **settings):
    values = {f"reptile.{name}": value for name, value in settings.items()}
    loop = runs.loop("reptile", kind="bert-dry", batch=BatchSpec(size=8, tokens=30), values=values)
    loop.set_mode(training=True)
    loop.moments.before_step(0, 3, 0)
    (_, course), *_ = loop.moments._asked
    return loop, course, loop.moments.batches(loop.feed.cut(0))


def slopes_of(course, batches, number):
    mine = [b for b in batches if course.rows.numbers(b.rows)[0] == number]
    loss = sum(course.forward(b).loss for b in mine) / sum(b.n_targets for b in mine)
    named = course.optimiser.named
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


@pytest.mark.acid("reptile", 1)
def test_reptile_with_one_inner_step_is_the_mean_of_the_tasks_gradients_and_nothing_has_moved(runs):
    loop, course, batches = begun(runs, inner=1)
    before = {n: p.detach().clone() for n, p in course.weights().items()}
    wanted = [slopes_of(course, batches, number) for number in (0, 1)]
    assert len(loop._gradients(0, batches)) == len(batches)
    for name, p in course.weights().items():
        assert torch.allclose(p.grad, (wanted[0][name] + wanted[1][name]) / 2, atol=1e-6), name
        assert torch.equal(p.detach(), before[name])


def test_reptile_the_gradient_is_the_way_to_where_the_inner_steps_lead(runs):
    loop, course, batches = begun(runs, inner=3, inner_lr=0.05)
    before = {n: p.detach().clone() for n, p in course.weights().items()}
    ends = []
    for number in (0, 1):
        values = dict(before)
        for _ in range(3):
            with course.holding(values):
                slopes = slopes_of(course, batches, number)
            values = {n: v - 0.05 * slopes[n] for n, v in values.items()}
        ends.append(values)
    loop._gradients(0, batches)
    for name, p in course.weights().items():
        wanted = (before[name] - (ends[0][name] + ends[1][name]) / 2) / 0.05
        assert torch.allclose(p.grad, wanted, atol=2e-5), name
        assert torch.equal(p.detach(), before[name]), "the outer numbers are as they were"

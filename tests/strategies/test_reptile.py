"""The acid tests of first-order meta-learning."""

import pytest
import torch
from in_memory import Runs, checkpoint

from luthier.runs.spec import BatchSpec, EvalSpec

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


@pytest.mark.acid("reptile", 2)
@pytest.mark.parametrize("names", ["reptile", "reptile+ema"])
def test_reptile_evaluation_leaves_the_model_the_optimisers_moments_and_what_is_remembered(runs, names):
    given = {"kind": "bert", "batch": BatchSpec(size=8, tokens=30), "trunk_dropout": "on"}
    plain, scored = (runs.loop(names, **given, eval=EvalSpec(every=every)) for every in (0, 1))
    plain.run_to()
    evaluations = []
    score = scored.evaluations.evaluator.outputs

    def watched():
        before, (tensors, _) = whole(scored), checkpoint(scored)
        assert any(bool(t.any()) for t in tensors["optimizer"].values()), "moments that could be lost"
        found = score()
        after, (others, _) = whole(scored), checkpoint(scored)
        evaluations.append(found["loss"])
        assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())
        assert all(torch.equal(t, others[part][n]) for part in tensors for n, t in tensors[part].items())
        return found

    scored.evaluations.evaluator.outputs = watched
    scored.run_to()
    assert len(set(evaluations)) == 3, "a model that learns is scored after each step"
    (tensors, _), (others, _) = checkpoint(plain), checkpoint(scored)
    assert tensors.keys() == others.keys() >= {"adapter", "optimizer"}
    assert all(torch.equal(t, others[part][n]) for part in tensors for n, t in tensors[part].items())


def whole(loop):
    """Every number of the model, frozen ones and buffers too, and whether it takes a gradient."""
    named = {n: t.detach().clone() for n, t in loop.tuned.model.state_dict().items()}
    return named | {f"{n} learns": torch.tensor(p.requires_grad) for n, p in loop.tuned.model.named_parameters()}

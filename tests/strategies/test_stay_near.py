"""Acid tests of the catalogue for strategies that stay near earlier weights: their formulas, written out."""

import dataclasses
import math

import pytest
import torch
from in_memory import Runs, alike

from luthier.core import ConfigError
from luthier.runs.spec import BatchSpec, DataSpec, OptimSpec, RunSpec
from luthier.surgery import is_head
from luthier.training import STRATEGIES

torch.set_num_threads(1)
L2SP, RecAdam, Mixout = (STRATEGIES.get(n) for n in ("l2_sp", "recadam", "mixout"))
ONE = BatchSpec(size=6, tokens=4096)
SPEC = RunSpec(model="m", data=DataSpec(source="d"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("near"))


def begun(runs, name, method="bitfit", kind="bert-dry", **given):
    """A loop that has begun, the strategy's course, and the strategy."""
    loop = runs.loop(name, method, kind, batch=ONE, **given)
    loop.moments.start()
    loop.set_mode(training=True)
    one, course = loop.moments._asked[0]
    loop.moments.before_step(0, loop.total, 0)
    return loop, course, one


def values(loop):
    return {n: p.detach().clone() for n, p in loop.tuned.trained().items()}


def moved(loop, by=0.1):
    for p in loop.tuned.trained().values():
        with torch.no_grad():
            p.add_(by * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def pulled(loop, course, one):
    """The slopes of a strategy's penalty alone, in the order of what trains."""
    loop.optimiser.zero_grad()
    assert one.penalty(course) is None, "it adds its slopes itself"
    slopes = [p.grad.clone() for p in loop.tuned.trained().values()]
    loop.optimiser.zero_grad()
    return slopes


# --- l2_sp


@pytest.mark.acid("l2_sp", 1)
def test_l2_sp_has_no_pull_at_the_start_and_its_formula_elsewhere(runs):
    loop, course, one = begun(runs, "l2_sp", values={"l2_sp.alpha": 0.3, "l2_sp.beta": 0.05})
    start = values(loop)
    at_start = pulled(loop, course, one)
    for (name, p), slope in zip(start.items(), at_start, strict=True):
        assert torch.allclose(slope, 0.05 * p if is_head(name) else torch.zeros_like(p)), name
    moved(loop)
    now = pulled(loop, course, one)
    for (name, p), slope in zip(values(loop).items(), now, strict=True):
        assert torch.allclose(slope, 0.05 * p if is_head(name) else 0.3 * (p - start[name]), atol=1e-6), name


@pytest.mark.acid("l2_sp", 2)
def test_under_a_strong_pull_the_model_stays_and_its_head_still_learns(runs):
    given = {"steps": 6, "optim": OptimSpec(name="sgd", lr=1e-3, clip=0.0)}
    free, held = (
        runs.after(None, "bitfit", **given),
        runs.loop("l2_sp", "bitfit", values={"l2_sp.alpha": 900.0}, **given),
    )
    start = values(held)
    held.run_to()

    def far(loop, new):
        return max(float((p - start[n]).abs().max()) for n, p in values(loop).items() if is_head(n) == new)

    assert far(held, False) < 0.5 * far(free, False) and far(held, True) > 0.8 * far(free, True)


@pytest.mark.acid("l2_sp", 3)
@pytest.mark.parametrize("form", ["coupled", "decoupled"])
def test_by_the_pull_alone_a_new_head_shrinks_to_nothing_and_the_model_goes_to_its_start(form, runs):
    pull = 1.0 if form == "coupled" else 30.0  # times the rate
    loop, course, one = begun(runs, "l2_sp", values={"l2_sp.alpha": pull, "l2_sp.beta": pull, "l2_sp.form": form})
    start = values(loop)
    moved(loop)
    loop.moments.rate(0, 3)
    there = values(loop)
    for _ in range(200):
        if form == "decoupled":
            one.after_step(course)
            continue
        slopes = pulled(loop, course, one)
        for p, slope in zip(loop.tuned.trained().values(), slopes, strict=True):
            p.data -= 0.1 * slope
    heads = [n for n in start if is_head(n)]
    assert heads and len(heads) < len(start)
    for name, p in values(loop).items():
        rest = torch.zeros_like(p) if name in heads else start[name]
        assert (p - rest).norm() < 1e-3 * (there[name] - rest).norm(), name


def test_the_decoupled_pull_is_its_formula(runs):
    settings = {"l2_sp.alpha": 0.5, "l2_sp.beta": 0.2, "l2_sp.form": "decoupled"}
    loop, course, one = begun(runs, "l2_sp", values=settings, optim=OptimSpec(lr=0.1, schedule="constant", warmup=0))
    start = values(loop)
    assert one.penalty(course) is None
    moved(loop)
    there = values(loop)
    loop.moments.rate(0, 3)
    one.after_step(course)
    for name, p in values(loop).items():
        wanted = there[name] * (1 - 0.02) if is_head(name) else there[name] - 0.05 * (there[name] - start[name])
        assert torch.allclose(p, wanted, atol=1e-7), name


def test_l2_sp_and_weight_decay_are_not_combined_silently():
    with pytest.raises(ConfigError, match="weight_decay = 0"):
        L2SP().check(dataclasses.replace(SPEC, optim=OptimSpec(weight_decay=0.01)))


# --- recadam


@pytest.mark.acid("recadam", 1, 4)
def test_long_before_t0_a_moved_weight_contracts_to_the_start_and_the_head_is_not_pulled(runs):
    settings = {"recadam.gamma": 100.0, "recadam.k": 1.0, "recadam.t0": 1000}
    optim = OptimSpec(lr=1e-3, schedule="constant", warmup=0)
    loop, course, one = begun(runs, "recadam", values=settings, optim=optim)
    start = values(loop)
    moved(loop)
    one.before_step(course)
    there = values(loop)
    loop.moments.rate(0, 3)
    one.after_step(course)  # Adam has made no step
    for name, p in values(loop).items():
        wanted = there[name] if is_head(name) else start[name] + (1 - 0.1) * (there[name] - start[name])
        assert torch.allclose(p, wanted, atol=1e-6), name


def test_recadam_is_its_formula_in_the_middle(runs):
    settings = {"recadam.gamma": 50.0, "recadam.k": 0.7, "recadam.t0": 2}
    optim = OptimSpec(lr=1e-2, schedule="constant", warmup=0)
    given = {"steps": 1, "optim": optim, "batch": ONE}
    plain = runs.after(None, "bitfit", "bert-dry", **given)
    loop = runs.loop("recadam", "bitfit", "bert-dry", values=settings, **given)
    start = values(loop)
    loop.run_to()
    share = 1 / (1 + math.exp(-0.7 * (1 - 2)))
    assert RecAdam(k=0.7, t0=2).share(1) == pytest.approx(share)
    for name, p in values(loop).items():
        step = values(plain)[name] - start[name]
        near = start[name] + share * step
        wanted = values(plain)[name] if is_head(name) else near - 1e-2 * (1 - share) * 50 * (near - start[name])
        assert torch.allclose(p, wanted, atol=1e-7), name


@pytest.mark.acid("recadam", 2, 3)
def test_recadam_is_adamw_long_after_t0_and_refuses_to_leap(runs):
    assert RecAdam(t0=10, k=1.0).share(1000) == 1.0
    given = {"steps": 3, "optim": OptimSpec(lr=1e-3)}
    late = runs.after("recadam", "bitfit", values={"recadam.gamma": 100.0, "recadam.k": 50.0, "recadam.t0": 1}, **given)
    assert not alike(late, runs.after(None, "bitfit", **given), 1e-6), "at t0 half of each acts"
    late = runs.loop("recadam", "bitfit", values={"recadam.gamma": 100.0, "recadam.k": 50.0, "recadam.t0": 0}, **given)
    late.run_to()
    assert alike(late, runs.after(None, "bitfit", **given), 1e-7)
    for lr in (2e-4, 1e-3):
        with pytest.raises(ConfigError, match=f"gamma below {1 / lr:g}"):
            RecAdam().check(dataclasses.replace(SPEC, optim=OptimSpec(lr=lr)))
    RecAdam().check(dataclasses.replace(SPEC, optim=OptimSpec(lr=2e-5)))
    with pytest.raises(ConfigError, match="weight_decay = 0"):
        RecAdam().check(dataclasses.replace(SPEC, optim=OptimSpec(weight_decay=0.1)))


# --- mixout


@pytest.mark.acid("mixout", 1, 2)
def test_what_has_not_moved_is_the_same_under_every_mask_and_the_mean_is_the_weight():
    one = Mixout(p=0.7)
    start, weight = torch.randn(4, 5), torch.randn(4, 5)
    draw = torch.Generator().manual_seed(0)
    masks = [(torch.rand(4, 5, generator=draw) >= 0.7).float() for _ in range(20_000)]
    assert all(torch.equal(one.mixed(start, start, mask), start) for mask in masks[:20])
    mean = torch.stack([one.mixed(weight, start, mask) for mask in masks]).mean(0)
    assert torch.allclose(mean, weight, atol=0.1)
    mask = masks[0]
    wanted = (mask * weight + (1 - mask) * start - 0.7 * start) / 0.3
    assert torch.allclose(one.mixed(weight, start, mask), wanted, atol=1e-6), "the formula of the paper"


@pytest.mark.acid("mixout", 4)
def test_the_gradient_of_mixout_is_that_of_the_mixed_weight_through_the_mask(runs):
    loop, course, one = begun(runs, "mixout", "lora", values={"mixout.p": 0.6})
    moved(loop)
    trained, before = loop.tuned.trained(), values(loop)
    mixes = dict(course.memory.tensors)
    assert mixes and all(trained[n].dim() == 2 and not is_head(n) for n in mixes)
    masks = {n: one._mask(course, n, 0) for n in mixes}
    batch = loop.feed.cut(0)[0]
    loop._gradients(0, [batch])
    ours = {n: p.grad.clone() for n, p in trained.items() if p.grad is not None}
    assert all(torch.equal(p, before[n]) for n, p in values(loop).items()), "put back, bit for bit"
    loop.optimiser.zero_grad()
    with course.holding({n: one.mixed(trained[n], mixes[n], masks[n]) for n in mixes}):
        (loop.objective(batch).loss / batch.n_targets).backward()
    for name, found in ours.items():
        wanted = trained[name].grad * masks[name] / 0.4 if name in masks else trained[name].grad
        assert torch.allclose(found, wanted, atol=1e-7), name
    loop.moments.before_step(1, loop.total, 0)
    assert any(not torch.equal(one._mask(course, n, 0), masks[n]) for n in masks), "drawn anew in each step"


@pytest.mark.acid("mixout", 5)
@pytest.mark.parametrize("masks", ["pass", "step"])
def test_masks_are_drawn_anew_at_each_pass_and_are_the_same_in_blocks_that_are_computed_twice(runs, masks):
    pieces = BatchSpec(size=3, tokens=4096, accumulate=2)
    given = {"values": {"mixout.p": 0.6, "mixout.masks": masks}, "steps": 3, "optim": OptimSpec(lr=1e-2)}
    loops = [
        runs.loop("mixout", "full", "bert-dry", batch=pieces, **given, gradient_checkpointing=g) for g in (False, True)
    ]
    seen = [[], []]
    for loop, found in zip(loops, seen, strict=True):
        query = loop.tuned.model.bert.encoder.layer[1].attention.self.query

        def look(module, args, found=found, loop=loop):
            if loop.moments._progress.step and not loop.moments._progress.trying:
                found.append(module.weight.detach().clone())

        query.register_forward_pre_hook(look)
        loop.run_to()
    once, twice = seen
    assert len(once) == 6 and len(twice) == 12, "two passes a step; a block that is computed again is called again"
    for step in (1, 2):  # in step 0 nothing has moved, and every mask gives the same
        first, again = twice[4 * step : 4 * step + 2], twice[4 * step + 2 : 4 * step + 4]
        assert torch.equal(*first) and torch.equal(*again), "what backward computes again has the mask of its pass"
        assert torch.equal(first[0], again[0]) == (masks == "step")
        assert torch.equal(once[2 * step], once[2 * step + 1]) == (masks == "step")
    assert alike(*loops, 1e-6)


def test_what_mixout_masks_matters(runs):
    given = {"steps": 4, "optim": OptimSpec(lr=1e-2)}
    drawn, none = (runs.after("mixout", "full", "bert-dry", values={"mixout.p": p}, **given) for p in (0.6, 0.0))
    assert not alike(drawn, none, 1e-4)


# --- self_ensemble


@pytest.mark.acid("self_ensemble", 1, 2)
@pytest.mark.parametrize("form", ["mean", "vote", "ema"])
def test_the_first_distance_to_the_past_is_nothing_and_teaches_nobody(form, runs):
    loop, course, one = begun(runs, "self_ensemble", values={"self_ensemble.form": form})
    loop.moments._piece = None
    loop._gradients(0, loop.feed.cut(0))
    assert course.progress.numbers["self_ensemble.apart"] < 1e-12
    assert not one.teacher(course, loop.moments._piece).requires_grad


@pytest.mark.acid("self_ensemble", 3)
def test_the_teacher_is_the_mean_of_the_last_k_weights_and_older_ones_are_forgotten(runs):
    loop = runs.loop("self_ensemble", "bitfit", values={"self_ensemble.k": 2}, steps=5)
    past, inner = [values(loop)], loop.moments.after_step

    def after_step(step, total):
        inner(step, total)
        past.append(values(loop))

    loop.moments.after_step = after_step
    loop.run_to()
    one, course = loop.moments._asked[0]
    (teacher,) = one._teachers(course)
    for name, value in teacher.items():
        assert torch.equal(value, torch.stack([past[-2][name], past[-1][name]]).mean(0)) or torch.allclose(
            value, (past[-2][name] + past[-1][name]) / 2, atol=1e-8
        )


def test_votes_are_the_mean_of_the_answers_of_each_of_the_past(runs):
    loop = runs.after("self_ensemble", "bitfit", "bert-dry", values={"self_ensemble.form": "vote"}, batch=ONE)
    one, course = loop.moments._asked[0]
    found = one.teacher(course, loop.moments._piece)
    singles = []
    for weights in one._teachers(course):
        with course.holding(weights), torch.no_grad():
            singles.append(loop.objective(loop.moments._piece.batch).logits)
    assert len(singles) == 3 and torch.allclose(found, torch.stack(singles).mean(0), atol=1e-6)

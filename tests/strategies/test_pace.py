"""Acid tests of the catalogue for strategies that say which numbers learn how fast, and when."""

import dataclasses
import inspect

import pytest
import torch
from in_memory import Runs, alike, same

from luthier.core import CompositionError, ConfigError
from luthier.runs.spec import DataSpec, OptimSpec, RunSpec
from luthier.strategies.pace import adaptive_freeze
from luthier.surgery.layer_groups import layer_groups
from luthier.training import STRATEGIES
from luthier.training.kept_prefix import Prefix

torch.set_num_threads(1)
CLR, GradualUnfreeze, LISA, AdaptiveFreeze = (
    STRATEGIES.get(n) for n in ("clr", "gradual_unfreeze", "lisa", "adaptive_freeze")
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory.mktemp("pace"))


# --- clr


@pytest.mark.acid("clr", 1)
def test_the_triangles_have_the_values_of_the_formula_and_of_torchs_schedule():
    total, half = 40, 10
    one = CLR(cycles=2, low=0.25)
    rates = [one.rate(step, total) for step in range(1, total + 2)]
    assert rates[0] == rates[2 * half] == rates[4 * half] == pytest.approx(0.25)
    assert rates[half] == rates[3 * half] == pytest.approx(1.0)
    for form in ("triangular", "triangular2", "exp_range"):
        parameter = torch.nn.Parameter(torch.zeros(1))
        optimiser = torch.optim.SGD([parameter], lr=0.25)
        theirs = torch.optim.lr_scheduler.CyclicLR(
            optimiser, base_lr=0.25, max_lr=1.0, step_size_up=half, mode=form, gamma=0.97, cycle_momentum=False
        )
        for step in range(1, total + 1):
            wanted = optimiser.param_groups[0]["lr"]
            assert CLR(cycles=2, form=form, gamma=0.97).rate(step, total) == pytest.approx(wanted), (form, step)
            optimiser.step()
            theirs.step()


@pytest.mark.acid("clr", 2)
def test_the_second_peak_of_triangular2_has_half_the_range():
    one = CLR(cycles=2, low=0.25, form="triangular2")
    assert one.rate(31, 40) == pytest.approx(0.25 + 0.75 / 2)


@pytest.mark.acid("clr", 3)
def test_rates_are_of_steps_and_not_of_micro_batches(runs):
    loop = runs.after("clr", steps=4, values={"clr.cycles": 1})
    assert len(loop.feed.cut(0)) > 1
    rates = [row["lr"] / loop.optimiser.lr for row in loop.run.rows if row["event"] == "step"]
    assert rates == pytest.approx([CLR(cycles=1).rate(s, 4) for s in range(1, 5)])


def test_cycles_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="at most 2"):
        CLR(cycles=3).check(RunSpec(model="m", data=DataSpec(source="d"), steps=5))


# --- gradual_unfreeze


def changed(loop, start):
    return {n for n, p in loop.tuned.trained().items() if not torch.equal(p.detach(), start[n])}


@pytest.mark.acid("gradual_unfreeze", 1)
def test_groups_join_from_the_top_down_until_all_have(runs):
    loop = runs.loop("gradual_unfreeze", "full", values={"gradual_unfreeze.every": 1}, steps=4)
    start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
    groups = layer_groups(loop.tuned, list(start))
    for made in range(1, 5):
        loop.run_to(made)
        free = {n for group in groups[: 1 + made] for n in group}
        assert changed(loop, start) <= free
        assert all(changed(loop, start) & set(g) for g in groups[: 1 + made] if g)
    assert len(groups) == 5, "the head, three blocks, the embeddings"


def test_the_head_may_learn_alone_at_first_and_an_epoch_is_the_usual_pace(runs):
    settings = {"gradual_unfreeze.head_first": True}
    loop = runs.loop("gradual_unfreeze", "full", values=settings, steps=12)
    start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
    groups = layer_groups(loop.tuned, list(start))
    loop.run_to(2)
    assert changed(loop, start) <= set(groups[0])
    noted = [row["gradual_unfreeze.groups"] for row in loop.run.rows if row["event"] == "step"]
    assert noted == [1, 1]


# --- lisa


@pytest.mark.acid("lisa", 1, 3)
def test_in_each_interval_exactly_so_many_blocks_change_and_moments_are_bounded(runs):
    loop = runs.loop("lisa", "full", values={"lisa.blocks": 1, "lisa.every": 2}, steps=8)
    names = list(loop.tuned.trained())
    top, *blocks, bottom = layer_groups(loop.tuned, names)
    sizes = {n: p.numel() * 8 for n, p in loop.tuned.trained().items()}
    bound = sum(sizes[n] for n in (*top, *bottom)) + max(sum(sizes[n] for n in g) for g in blocks)
    drawn = []
    for made in range(2, 9, 2):
        start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
        loop.run_to(made)
        moved = [i for i, group in enumerate(blocks) if changed(loop, start) & set(group)]
        assert len(moved) == 1
        drawn += moved
        assert loop.optimiser.state_bytes() <= bound
        assert not any(n in loop.optimiser.first for i, g in enumerate(blocks) if i not in moved for n in g)
    assert len(set(drawn)) > 1, "others are drawn"


@pytest.mark.acid("lisa", 2)
def test_blocks_are_drawn_alike_often(runs):
    loop = runs.loop("lisa", "full", values={"lisa.blocks": 2, "lisa.every": 5}, steps=8)
    (one, course), *_ = loop.moments._asked
    top, *blocks, bottom = layer_groups(loop.tuned, list(loop.tuned.trained()))
    counts, last = [0] * len(blocks), None
    for step in range(1, 3001):
        course.progress.step = step
        found = set(one.trains(course))
        assert found >= {*top, *bottom}
        if step % 5 == 1:
            awake = [i for i, group in enumerate(blocks) if found & set(group)]
            assert len(awake) == 2 and all(found >= set(blocks[i]) for i in awake)
            counts = [c + (i in awake) for i, c in enumerate(counts)]
        else:
            assert found == last, "the same until the next draw"
        last = found
    assert len(counts) == 3 and all(abs(c - 400) < 5 * (600 * 2 / 9) ** 0.5 for c in counts), counts


# --- adaptive_freeze


@pytest.mark.acid("adaptive_freeze", 1)
def test_what_rests_is_a_prefix_that_grows_and_never_wakes(runs):
    values = {"adaptive_freeze.every": 1, "adaptive_freeze.percent": 90.0}
    loop = runs.loop("adaptive_freeze", "full", values=values, steps=8)
    groups = [g for g in reversed(layer_groups(loop.tuned, list(loop.tuned.trained()))[1:]) if g]
    resting = []
    for made in range(1, 9):
        start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
        asleep = loop.moments._asked[0][1].memory.facts.get("resting", 0)
        loop.run_to(made)
        resting.append(asleep)
        assert not changed(loop, start) & {n for g in groups[:asleep] for n in g}
    assert resting == sorted(resting) and 0 < resting[-1] < len(groups)


@pytest.mark.parametrize(
    ("pull", "settings"),
    [
        ("l2_sp", {"l2_sp.alpha": 5.0, "l2_sp.form": "decoupled"}),
        ("recadam", {"recadam.gamma": 20.0, "recadam.k": 1.0, "recadam.t0": 2}),
    ],
)
def test_a_pull_to_the_start_moves_nothing_that_rests(runs, pull, settings):
    values = {"adaptive_freeze.every": 1, "adaptive_freeze.percent": 90.0, **settings}
    given = {"steps": 6, "optim": OptimSpec(lr=0.01, weight_decay=0.0)}
    loop = runs.loop(f"adaptive_freeze+{pull}", "full", values=values, **given)
    while True:
        start = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
        loop.run_to(loop.step + 1)
        if loop.moments.resting or loop.step == 6:
            break
    moved = changed(loop, start)
    assert loop.moments.resting and moved and not moved & loop.moments.resting


KEEP = {"adaptive_freeze.every": 1, "adaptive_freeze.percent": 90.0}


@pytest.mark.acid("adaptive_freeze", 3)
@pytest.mark.parametrize("method", ["full", "lora"])
def test_kept_states_of_the_prefix_are_those_of_a_live_pass_to_the_bit(runs, method):
    given = {"steps": 8, "trunk_dropout": "off", "optim": OptimSpec(name="sgd", lr=0.05)}
    loop = runs.loop("adaptive_freeze", method, "bert-dry", values={**KEEP, "adaptive_freeze.keep": True}, **given)
    loop.run_to(7)
    ((_, course),) = loop.moments._asked
    kept = adaptive_freeze._KEPT[loop.feed]
    assert 0 < kept.depth < 3 and kept.depth <= course.memory.facts["resting"] and not kept.why_not
    loop.set_mode(training=False)
    ran = []
    for number, block in enumerate(kept._blocks):
        block.attention.register_forward_hook(lambda *told, number=number: ran.append(number))
    for group in kept._groups._groups[:3]:
        batch = loop.feed.batches.collator(loop.feed.batches.examples, group)
        live = loop.tuned.model(**batch.inputs).logits
        ran.clear()
        with kept.standing_in(batch):
            kept._groups._known[:] = True  # what follows fills nothing
            ran.clear()
            again = loop.tuned.model(**batch.inputs).logits
        assert torch.equal(live, again) and not ran, "the resting blocks are not run"
        some = loop.feed.batches.collator(loop.feed.batches.examples, group[::2])
        with kept.standing_in(some):
            found = loop.tuned.model(**some.inputs).logits
        assert torch.allclose(found, live[::2], atol=1e-5), "beside other rows, to rounding"
        kept._groups._known[:] = False
    plain = runs.after("adaptive_freeze", method, "bert-dry", values=KEEP, **given)
    whole = runs.after("adaptive_freeze", method, "bert-dry", values={**KEEP, "adaptive_freeze.keep": True}, **given)
    assert alike(plain, whole, 1e-5)
    stopped = {"values": {**KEEP, "adaptive_freeze.keep": True}, **given}
    assert same(whole, runs.resumed(6, "adaptive_freeze", method, "bert-dry", **stopped))


def test_states_are_not_kept_where_something_else_would_change_them(runs):
    kept = {**KEEP, "adaptive_freeze.keep": True}
    with pytest.raises(ConfigError, match="trunk_dropout = off"):
        runs.loop("adaptive_freeze", "full", values=kept)
    for names, method in (("adaptive_freeze+mixout", "full"), ("adaptive_freeze", "adalora")):
        with pytest.raises(CompositionError, match=r"Leave adaptive_freeze\.keep out"):
            runs.loop(names, method, values=kept, trunk_dropout="off")
    loop = runs.after("adaptive_freeze", "prompt_tuning+bitfit", values=kept, steps=5, trunk_dropout="off")
    held = adaptive_freeze._KEPT.get(loop.feed)
    assert held is None or "beside the text" in held.why_not
    batches = runs.loop("adaptive_freeze", "full", values=kept, trunk_dropout="off").feed.batches
    batches.collator = dataclasses.replace(batches.collator, corruption=object())
    assert "read otherwise each time" in Prefix(loop.tuned, batches, 1).why_not


def _prefix(runs, depth=1, arch="bert-dry"):
    """With nothing below that trains."""
    loop = runs.loop("adaptive_freeze", "full", arch, trunk_dropout="off")
    for parameter in loop.tuned.model.parameters():
        parameter.requires_grad_(False)
    loop.set_mode(training=False)
    return loop, Prefix(loop.tuned, loop.feed.batches, depth)


def _group(prefix, number=0):
    batches = prefix.batches
    several = [group for group in prefix._groups._groups if len(group) > 1]
    return batches.collator(batches.examples, several[number])


def test_where_memory_runs_out_in_the_trial_of_what_is_kept_it_is_tried_again(runs, monkeypatch):
    _, prefix = _prefix(runs)
    tried = []

    def trial(self, batch):
        tried.append(len(batch.rows))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return len(tried) == 2

    monkeypatch.setattr(Prefix, "_tried", trial)
    batch = _group(prefix)
    with prefix.standing_in(batch):
        assert "forward" not in prefix._blocks[0].__dict__, "a pass over rows of which one is unlike is a whole one"
    assert len(tried) == 3 and tried[1] + tried[2] == tried[0]
    assert prefix.unlike[batch.rows].sum() == tried[2] and not prefix.why_not


def test_every_group_is_tried_on_two_rows_and_without_logits(runs, monkeypatch):
    loop, prefix = _prefix(runs, depth=2)
    rows, heads = [], []
    loop.tuned.model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    loop.tuned.model.classifier.register_forward_hook(lambda *told: heads.append(told))
    for number in range(2):
        rows.clear()
        batch = _group(prefix, number)
        with prefix.standing_in(batch):
            pass
        assert rows[0] == len(batch.rows) and max(rows[1:]) <= 2 and len(rows) > 1, "each group, on two of its rows"
    assert not heads and not prefix.unlike.any()


def test_a_language_models_padded_rows_are_kept_too(runs):
    loop, prefix = _prefix(runs, arch="llama")
    examples = prefix.batches.examples
    batch = prefix.batches.collator(examples, examples.lengths.argsort()[[0, -1]])
    real = batch.inputs["attention_mask"].bool()
    prefix._keep(batch)
    assert not real.all() and not prefix.unlike.any() and not prefix.why_not
    live = loop.tuned.model(**batch.inputs).logits[real]
    with prefix._given(prefix._laid_out(batch)):
        assert torch.equal(loop.tuned.model(**batch.inputs).logits[real], live)


def test_a_trunk_that_also_gives_what_is_passed_over_is_read_whole(runs):
    loop, prefix = _prefix(runs, depth=2)
    loop.tuned.model.config.output_hidden_states = True
    batch = _group(prefix)
    with prefix.standing_in(batch):
        assert "forward" not in prefix._blocks[0].__dict__
    assert prefix.unlike[batch.rows].all()


def test_blocks_that_are_called_by_keyword_are_passed_over(runs):
    loop, prefix = _prefix(runs, depth=2)

    def by_name(block, args, kwargs):
        names = list(inspect.signature(type(block).forward).parameters)[1:]
        return (), dict(zip(names, args, strict=False)) | kwargs

    for block in prefix._blocks:
        block.register_forward_pre_hook(by_name, with_kwargs=True)
    batch = _group(prefix)
    live = loop.tuned.model(**batch.inputs).logits
    with prefix.standing_in(batch):
        assert "forward" in prefix._blocks[0].__dict__
        assert torch.equal(loop.tuned.model(**batch.inputs).logits, live)


def test_the_run_of_settled_blocks_is_that_of_the_percentile():
    one = AdaptiveFreeze(percent=50.0)
    assert one.settled([1, 1, 1, 1, 1], [1.01, 1.02, 1.9, 1.03, 1.5], 0) == 2, "changes .01 .02 .9 .03 .5, median .03"
    assert one.settled([1, 1, 1], [1.9, 1.0, 1.0], 0) == 0, "a prefix: the lowest has not settled"
    assert one.settled([1, 1, 1, 1], [1, 1.01, 1.02, 1.5], 2) == 3
    assert AdaptiveFreeze(percent=0.0).settled([1, 1], [1, 1], 0) == 0

"""IncreLoRA: its own tests, beside those that every method passes."""

import math
from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.checks import logits, optimiser, stir, train
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import ConfigError
from luthier.methods.reparameterised.increlora import WAITING, GrownTriplets, IncreLoRA
from luthier.surgery import attach, load
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests


def _modules(tuned):
    return list(tuned.modules(GrownTriplets).values())


def _ranks(tuned):
    return [int(m.alive.sum()) for m in _modules(tuned)]


def _step(method, tuned, step, total, scores):
    """One step in which the sites score `scores`, with nothing computed."""
    for module, score in zip(_modules(tuned), scores, strict=True):
        module._sensed = torch.tensor(float(score))
    method.on_step(tuned, step, total)
    return _ranks(tuned)


@pytest.mark.acid("increlora", 1)
@pytest.mark.parametrize(
    ("top", "by", "total"), [(2, 1, 20), (4, 3, 20), (5, 2, 7), (1, 1, 3), (18, 1, 30)]
)  # also with a remainder, also with more growths than steps
def test_the_total_rank_is_the_target_and_no_more(top, by, total):
    method = IncreLoRA(rank=1, target_rank=3, most=6, top=top, by=by)
    tuned = attach(tiny("bert"), method)
    n = len(_modules(tuned))
    for step in range(1, total + 1):
        found = _step(method, tuned, step, total, torch.rand(n))
        assert sum(found) == method.budget(step, total, n, 3 * n) <= 3 * n
    assert sum(found) == 3 * n
    assert not any(bool(m.waits.any()) for m in _modules(tuned)), "what still waits leaves"


@pytest.mark.acid("increlora", 1)
def test_ties_grow_no_site_too_many():
    method = IncreLoRA(target_rank=2, most=4, top=2)
    tuned = attach(tiny("bert"), method)
    for step in range(1, 21):
        found = _step(method, tuned, step, 20, [0.0] * 6)
    assert sum(found) == 12 and max(found) <= 4


@pytest.mark.acid("increlora", 2, 3)
def test_no_rank_falls_and_as_many_places_grow_each_time():
    method = IncreLoRA(rank=1, target_rank=4, most=8, top=2, by=1, warmup=0.1, settled=0.4)
    tuned = attach(tiny("bert"), method)
    before, grown = _ranks(tuned), []
    for step in range(1, 101):
        now = _step(method, tuned, step, 100, torch.rand(6))
        assert all(a <= b for a, b in zip(before, now, strict=True))
        grown.append([b - a for a, b in zip(before, now, strict=True)])
        before = now
    times = [g for g in grown if any(g)]
    assert len(times) == 9 and all(sorted(g) == [0, 0, 0, 0, 1, 1] for g in times)
    assert not any(any(g) for g in grown[:10] + grown[60:]), "neither in the warm-up nor when settled"


@pytest.mark.acid("increlora", 4)
@pytest.mark.parametrize("training", [True, False])
def test_growing_hardly_moves_the_loss(training):
    model = tiny("bert")
    tuned = attach(model, IncreLoRA(rank=1, target_rank=3, most=6))
    stir(tuned)
    batch = inputs(model)

    def loss():
        for module in _modules(tuned):
            module.train(training)
        with torch.no_grad():
            return float(model(**batch).loss)

    model.eval()
    before = loss()
    for module in _modules(tuned):
        module.grow(1, 1)
    assert abs(loss() - before) < 1e-4
    with torch.no_grad():
        for module in _modules(tuned):
            module.scale *= 3  # what dividing by another rank would do
    assert abs(loss() - before) > 1e-3, "the model does listen to its triplets"


@pytest.mark.acid("increlora", 5)
def test_each_tensor_is_in_the_optimiser_once_before_and_after_growing():
    tuned = attach(tiny("bert"), IncreLoRA(rank=1, target_rank=2, most=4))
    held = [id(p) for group in optimiser(tuned).param_groups for p in group["params"]]
    train(tuned, 10)
    assert sum(_ranks(tuned)) == 12, "it has grown"
    mine = [id(p) for m in _modules(tuned) for p in m.parameters()]
    assert [held.count(i) for i in mine] == [1] * 18
    named = [n for group in tuned.tuning().method.groups(tuned) for n in group.names]
    assert len(named) == len(set(named)) == 18, "and in one group"


def _projection(model, place):
    kind, layer = place.split("@")
    attention = model.bert.encoder.layer[int(layer)].attention.self
    return attention.value if kind == "attn.v" else attention.query


@pytest.mark.acid("increlora", 6)
@pytest.mark.parametrize(("place", "seed"), [("attn.q@0", 0), ("attn.v@0", 1), ("attn.q@1", 2), ("attn.v@2", 3)])
def test_a_planted_layer_gets_the_largest_rank(place, seed):
    """It alone has something to fit, which a teacher's projection gives there; labels are drawn, so that all others
    have gradients and nothing to learn.
    """
    model, teacher = tiny("bert"), tiny("bert")
    stir(attach(teacher, "lora", sites=(place,), rank=4), seed=seed)
    method = IncreLoRA(rank=1, target_rank=2, most=8, top=1, warmup=0.3, settled=0.3)
    tuned = attach(model, method, seed=seed)
    step_with, total, seen, draw = optimiser(tuned, decay=0.0), 60, [], torch.Generator().manual_seed(seed)
    for each in (model, teacher):
        _projection(each, place).register_forward_hook(lambda module, args, out: seen.append(out))
    for step in range(1, total + 1):
        batch = inputs(model, seed=step % 4)
        batch["labels"] = torch.randint(0, model.config.num_labels, batch["labels"].shape, generator=draw)
        seen.clear()
        logits(teacher, batch)
        model.eval()
        for module in _modules(tuned):
            module.train()
        method.before_step(tuned, step, total)
        loss = model(**batch).loss
        (loss + (seen[1] - seen[0]).square().mean()).backward()
        method.after_backward(tuned, step, total)
        step_with.step()
        method.on_step(tuned, step, total)
        step_with.zero_grad()
    ranks = dict(zip(tuned.modules(GrownTriplets), _ranks(tuned), strict=True))
    assert sum(ranks.values()) == 12
    assert max(ranks, key=ranks.__getitem__) == place and ranks[place] > 2


@pytest.mark.parametrize(("turns", "scale", "rows"), [(1, 1.0, 1024), (2, 1.0, 3), (1, 128.0, 2)])
def test_the_score_is_that_of_the_whole_gradient(turns, scale, rows):
    """Of all micro-batches together, whatever scales the backward pass or repeats it."""
    torch.manual_seed(0)
    module, factor = GrownTriplets(5, 7, 2, 4, 1, 2.0).train(), turns * scale
    with torch.no_grad():
        module.l.normal_()
    module.watching = True
    xs, wanted = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 7)
    delta = ((module.p * module.middle()) @ module.q).detach().requires_grad_()
    for x, y in zip(xs, wanted, strict=True):
        (x @ delta.T - y).pow(2).sum().backward()
        for _ in range(turns):
            ((module.after(x, torch.zeros(3, 4, 7)) - y).pow(2).sum() * scale).backward()
    module.l.grad /= factor  # as the loop does before it asks
    module.sense(rows)
    closed = (delta.detach() * delta.grad).abs().sum() / math.sqrt(35)
    torch.testing.assert_close(module._sensed, closed, rtol=1e-4, atol=0)
    assert not module.seen, "nothing is kept"


def test_what_waits_learns_where_to_point_and_what_comes_later_rests():
    tuned = attach(tiny("bert"), IncreLoRA(rank=1, target_rank=3, most=5, warmup=0.9, settled=0.05))
    before = [(m.p.detach().clone(), m.l.detach().clone()) for m in _modules(tuned)]
    train(tuned, 8, total=1000, decay=0.0)
    for module, (p, l) in zip(_modules(tuned), before, strict=True):
        moved = (module.p != p).any(0).tolist()
        assert moved == [True, True, False, False, False]
        assert (module.l != l).tolist() == [True, False, False, False, False]
        assert module.eval().middle()[1] == 0
        torch.testing.assert_close(module.train().middle()[1], torch.tensor(WAITING * module.scale))


def test_a_whole_run_stores_the_target_and_loads_to_the_bit(tmp_path):
    method = IncreLoRA(target_rank=2, most=4)
    model = tiny("bert")
    tuned = attach(model, method)
    train(tuned, 20)
    before = logits(model)
    tuned.finish()
    assert sum(p.numel() for m in tuned.modules().values() for p in m.parameters()) == method.n_stored(tuned.anatomy)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(model))


def test_a_run_stopped_while_it_grows_goes_on_to_the_bit(tmp_path):
    settings = {"target_rank": 2, "most": 4, "top": 1, "warmup": 0.1, "settled": 0.2}
    spec = replace(little_spec(tmp_path, "increlora"), settings=settings, steps=10)
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (1, 4, 6):
        run(replace(spec, out=str(tmp_path / f"at-{stop}")), stop_at=stop)
        resume(tmp_path / f"at-{stop}")
        assert run_digests(tmp_path / f"at-{stop}") == run_digests(tmp_path / "whole")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_in_a_run_scores_are_those_of_the_gradient_of_the_whole_step(tmp_path, monkeypatch, checkpointing):
    """Of all its micro-batches, at least two, also where activations are computed twice."""
    found, keep = [], GrownTriplets.sense

    def sense(module):
        pairs = [(d.flatten(0, -2), x.flatten(0, -2)) for d, x in module.seen]
        assert len({d.norm().item() for d, _ in pairs}) == len(pairs) >= 2, "each pass is seen once"
        with torch.no_grad():
            update = (module.p * module.middle()) @ module.q
            whole = (update * sum(d.T @ x for d, x in pairs)).abs().sum() / math.sqrt(update.numel())
        keep(module)
        found.append((float(whole), float(module._sensed)))

    monkeypatch.setattr(GrownTriplets, "sense", sense)
    spec = little_spec(tmp_path, "increlora", out=str(tmp_path / "run"), gradient_checkpointing=checkpointing, steps=4)
    run(replace(spec, settings={"warmup": 0.9, "settled": 0.0}))
    assert len(found) == 4 * 6 and all(whole > 0 for whole, _ in found[6:]), "l is zero in the first step alone"
    for whole, sensed in found:
        assert sensed == pytest.approx(whole, rel=1e-3, abs=1e-12)


def test_ranks_that_fall_and_a_schedule_without_room_are_refused():
    with pytest.raises(ConfigError, match="rank 3, target_rank 2 and most 8 must not fall"):
        IncreLoRA(rank=3, target_rank=2)
    with pytest.raises(ConfigError, match="their sum must be below 1"):
        IncreLoRA(warmup=0.5, settled=0.5)

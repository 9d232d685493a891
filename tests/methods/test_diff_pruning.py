"""Diff pruning: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from methods.checks import logits, stir, train
from tiny import inputs, tiny

from luthier.methods.partial.diff_pruning import HIGH, LOW, DiffPruning, Gated, gate
from luthier.surgery import attach, load
from luthier.surgery.phases import Phases


def _numbers(tuned):
    return sum(m.shape.numel() for m in tuned.modules(Gated).values())


@pytest.mark.acid("diff_pruning", 1)
@pytest.mark.parametrize("logit", [-2.0, 0.0, 1.0, 5.0])
def test_gates_close_and_open_as_often_as_the_closed_form_says(logit):
    draw = torch.Generator().manual_seed(0)
    z = gate(torch.full((200_000,), logit), torch.rand(200_000, generator=draw).clamp(1e-7, 1 - 1e-7))
    # s̄ <= 0 where logit(u) <= logit(-lo / (hi - lo)) - a, and logit(u) is logistic.
    closed = 1 / (1 + math.exp(logit - math.log(-LOW / HIGH)))
    opened = 1 - 1 / (1 + math.exp(logit - math.log((1 - LOW) / (HIGH - 1))))
    assert abs(float((z == 0).float().mean()) - closed) < 0.004
    assert abs(float((z == 1).float().mean()) - opened) < 0.004


@pytest.mark.acid("diff_pruning", 2)
def test_the_penalty_has_the_gradient_of_the_expected_count():
    method = DiffPruning(l0=0.5)
    tuned = attach(tiny("bert"), method)
    stir(tuned, 1.0)
    method.extra_loss(tuned).backward()
    for module in tuned.modules(Gated).values():
        slope = torch.sigmoid(module.gates) * torch.sigmoid(-module.gates)
        torch.testing.assert_close(module.gates.grad, 0.5 * slope)
        slope = torch.sigmoid(module.whole) * torch.sigmoid(-module.whole)
        torch.testing.assert_close(module.whole.grad, 0.5 * slope)
        assert module.delta.grad is None


def test_the_whole_gate_s_gradient_is_the_sum_over_its_tensor():
    module = Gated((3, 4), 0.3, True).eval()
    with torch.no_grad():
        module.delta.normal_()
        module.gates.uniform_(-0.5, 0.5)
    weight = torch.randn(3, 4)
    (module(torch.zeros(3, 4)) * weight).sum().backward()
    each = weight * module.delta.detach() * gate(module.gates.detach(), None)
    s = torch.sigmoid(module.whole.detach())
    torch.testing.assert_close(module.whole.grad, each.sum() * s * (1 - s) * (HIGH - LOW))


def test_gates_are_drawn_anew_at_every_pass_in_training_and_never_in_evaluation():
    torch.manual_seed(0)  # the gate of the whole tensor may be shut both times, about once in 30
    module = Gated((5, 6), 0.0, True)
    with torch.no_grad():
        module.delta.fill_(1.0)
    frozen = torch.zeros(5, 6)
    assert not torch.equal(module(frozen), module(frozen))
    module.eval()
    assert torch.equal(module(frozen), module(frozen))


def test_the_start_is_the_base_even_in_training():
    model = tiny("gpt2")
    before = logits(model)
    attach(model, "diff_pruning")
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    model.luthier.train()
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs(model)).logits, before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_counts(name):
    tuned = attach(tiny(name), "diff_pruning")
    n = _numbers(tuned)
    heads = set(tuned.anatomy.head_tensors)
    assert n == sum(math.prod(s) for k, s in tuned.anatomy.tensors.items() if k not in heads)
    assert tuned.n_trained() == 2 * n + len(tuned.modules(Gated)) == tuned.tuning().method.n_params(tuned.anatomy)


@pytest.mark.acid("diff_pruning", 5)
def test_closing_a_whole_gate_removes_that_tensor_s_difference():
    tuned = attach(tiny("bert"), "diff_pruning")
    stir(tuned, 0.1)
    module = next(iter(tuned.modules(Gated).values())).eval()
    frozen = torch.randn(module.shape)
    assert not torch.equal(module(frozen), frozen)
    with torch.no_grad():
        module.whole.fill_(-30.0)
    assert torch.equal(module(frozen), frozen)


@pytest.mark.acid("diff_pruning", 3)
def test_projection_keeps_exactly_the_largest():
    method = DiffPruning(share=0.01)
    tuned = attach(tiny("bert"), method)
    stir(tuned, 0.5)
    modules = list(tuned.modules(Gated).values())
    before = torch.cat([m.difference().flatten() for m in modules])
    method.on_step(tuned, 5, 10)
    after = torch.cat([m.difference().flatten() for m in modules])
    k = math.floor(0.01 * len(before))
    assert int((after != 0).sum()) == k
    assert before.abs()[after == 0].max() <= before.abs()[after != 0].min()
    assert torch.equal(after[after != 0], before[after != 0])
    assert method.extra_loss(tuned) is None


def test_a_run_moves_only_the_chosen_entries_and_is_stored_sparsely(tmp_path):
    method = DiffPruning(share=0.02)
    model = tiny("bert")
    original = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = attach(model, method)
    train(tuned, 8, lr=1e-3, decay=0.1)
    modules = tuned.modules(Gated)
    k = math.floor(0.02 * _numbers(tuned))
    moved = 0
    for key, module in modules.items():
        frozen = original[key.removeprefix("tensor/")]
        now = module(frozen)
        assert torch.equal(now[~module.mask], frozen[~module.mask])
        moved += int((now != frozen).sum())
    assert 0 < moved <= k
    before = logits(model)
    tuned.finish()
    assert torch.equal(logits(model), before)
    assert sum(m.values.numel() for m in modules.values()) == k
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    found = load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), before)
    stored = sum(t.numel() for m in found.modules(Gated).values() for t in m.stored().values())
    assert stored == method.n_stored(tuned.anatomy) == 2 * k
    plain = found.merge()
    assert torch.equal(logits(plain), before)


@pytest.mark.acid("diff_pruning", 4)
def test_the_second_phase_tunes_the_survivors():
    tuned = attach(tiny("bert"), DiffPruning(share=0.02, gating=0.3))
    train(tuned, 3, total=10, lr=1e-2)
    modules = list(tuned.modules(Gated).values())
    start = [m.difference() for m in modules]
    gates = [m.gates.detach().clone() for m in modules]
    train(tuned, 3, total=3, lr=1e-2)
    assert any(not torch.equal(m.difference(), s) for m, s in zip(modules, start, strict=True))
    assert all(torch.equal(m.gates, g) for m, g in zip(modules, gates, strict=True)), "the gates have no gradient now"
    assert all(not m.difference()[s == 0].any() for m, s in zip(modules, start, strict=True)), "nothing comes back"


def test_a_run_resumed_in_its_second_phase_goes_on_there():
    method = DiffPruning(share=0.02)
    tuned = attach(tiny("bert"), method)
    train(tuned, 4, lr=1e-3)
    state = {n: t.clone() for n, t in tuned.state.tensors().items()}
    again = attach(tiny("bert"), method)
    again.state.load_tensors(state)
    assert all(m.is_fixed for m in again.modules(Gated).values())
    assert torch.equal(logits(again.model), logits(tuned.model))


def test_gates_learn_at_their_own_rate_without_decay():
    tuned = attach(tiny("bert"), DiffPruning(gate_rate=50.0))
    (group,) = tuned.groups()
    assert group.lr_factor == 50.0
    assert group.weight_decay == 0.0
    assert {n.rpartition(".")[2] for n in group.names} == {"gates", "whole"}
    assert len(group.names) == 2 * len(tuned.modules(Gated))


def test_without_whole_gates_the_count_says_so():
    tuned = attach(tiny("bert"), "diff_pruning", structured=False)
    assert tuned.n_trained() == 2 * _numbers(tuned) == tuned.tuning().method.n_params(tuned.anatomy)


def test_gates_close_under_a_heavy_penalty():
    method = DiffPruning(l0=1.0, gating=1.0)
    tuned = attach(tiny("bert"), method)
    before = float(sum(m.open_gates().detach() for m in tuned.modules(Gated).values()))
    train(tuned, 6, lr=0.5)
    after = float(sum(torch.sigmoid(m.gates.detach()).sum() for m in tuned.modules(Gated).values()))
    assert after < 0.99 * before


def test_the_second_phase_begins_anew_with_the_survivors_and_alone_is_scored():
    method = DiffPruning(share=0.02, gating=0.4, sparse_rate=7.0)
    tuned = attach(tiny("bert"), method)
    stir(tuned, 0.5)
    phases = Phases(tuned, [method])
    assert [phases.settled(step, 10) for step in (3, 4, 5)] == [False, False, True]
    assert phases.schedule(5, 10) == (1, 6, 7.0)
    phases.enter(1, 10)
    assert not any(m.is_fixed for m in tuned.modules(Gated).values())
    phases.enter(5, 10)
    assert all(m.is_fixed for m in tuned.modules(Gated).values())
    kept = sum(int((m.difference() != 0).sum()) for m in tuned.modules(Gated).values())
    assert kept == math.floor(0.02 * _numbers(tuned))


@pytest.mark.parametrize("gating", [0.0, 1.0])
def test_a_run_of_one_phase_has_none(gating):
    method = DiffPruning(gating=gating)
    assert not Phases(attach(tiny("bert"), method), [method])

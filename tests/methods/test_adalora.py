"""AdaLoRA: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir, train
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.reparameterised.adalora import AdaLoRA, Triplets
from luthier.surgery import attach, load


def _alive(tuned):
    return sum(int((m.l != 0).sum()) for m in tuned.modules(Triplets).values())


@pytest.mark.acid("adalora", 2)
def test_the_budget_falls_by_the_cubic():
    method = AdaLoRA(warmup=0.1, settled=0.4)
    found = [method.budget(t, 1000, 120, 80) for t in (50, 100, 225, 350, 475, 600, 900)]
    cubic = [80 + 40 * (1 - s) ** 3 for s in (0, 0, 0.25, 0.5, 0.75, 1, 1)]
    assert found == [round(b) for b in cubic]


@pytest.mark.acid("adalora", 1)
@pytest.mark.parametrize("every", [1, 3])
def test_exactly_the_budget_is_alive_after_each_allocation(every):
    method = AdaLoRA(rank=6, target_rank=2, every=every, warmup=0.1, settled=0.3, sites=("attn.q", "ffn.down"))
    tuned = attach(tiny("bert"), method)
    modules = list(tuned.modules(Triplets).values())
    total, start = 20, 6 * len(modules)
    for step in range(1, total + 1):
        with torch.no_grad():
            for module in modules:
                module.l.copy_(torch.rand(6) + 0.5)
        for module in modules:
            module.p.grad, module.l.grad, module.q.grad = (torch.randn_like(p) for p in (module.p, module.l, module.q))
        method.after_backward(tuned, step, total)
        method.on_step(tuned, step, total)
        if step >= 14 or (step > 2 and step % every == 0):
            assert _alive(tuned) == method.budget(step, total, start, 2 * len(modules))
    assert _alive(tuned) == 2 * len(modules)


@pytest.mark.acid("adalora", 1)
def test_tied_scores_keep_exactly_the_budget():
    method = AdaLoRA(rank=6, target_rank=2, warmup=0.0, settled=0.5)
    tuned = attach(tiny("bert"), method)
    stir(tuned)
    for step in (1, 2, 3, 4):
        method.on_step(tuned, step, 4)  # no gradient was ever sensed: every score is zero
    assert _alive(tuned) == 2 * len(tuned.modules(Triplets))


@pytest.mark.acid("adalora", 3)
def test_importance_is_the_closed_form_of_its_two_averages():
    torch.manual_seed(0)
    module, beta1, beta2 = Triplets(5, 4, 3, 1.0), 0.8, 0.6
    mean = dict.fromkeys("plq", 0.0)
    spread = dict.fromkeys("plq", 0.0)
    for _ in range(5):
        for name in "plq":
            parameter = getattr(module, name)
            parameter.grad = torch.randn_like(parameter)
            sensed = (parameter * parameter.grad).abs().detach()
            mean[name] = beta1 * mean[name] + (1 - beta1) * sensed
            spread[name] = beta2 * spread[name] + (1 - beta2) * (sensed - mean[name]).abs()
        module.sense()
        module.remember(beta1, beta2)
    e = {n: mean[n] * spread[n] for n in "plq"}
    torch.testing.assert_close(module.importance(), e["l"] + e["p"].mean(0) + e["q"].mean(1))


def test_importance_forgets_a_step_that_was_not_taken():
    method = AdaLoRA()
    tuned = attach(tiny("bert"), method)
    module = next(iter(tuned.modules(Triplets).values()))
    module.l.grad = torch.full_like(module.l, float("nan"))
    method.after_backward(tuned, 1, 10)
    module.l.grad = torch.ones_like(module.l)
    method.after_backward(tuned, 1, 10)  # the same step again; the first try was refused
    method.on_step(tuned, 1, 10)
    assert torch.isfinite(module.importance()).all()


def test_importance_is_not_that_of_clipped_gradients():
    shares = []
    for size in (1.0, 1000.0):
        method = AdaLoRA(sites=("attn.q",))
        tuned = attach(tiny("bert"), method)
        stir(tuned)
        module = next(iter(tuned.modules(Triplets).values()))
        module.l.grad = torch.ones_like(module.l) * size
        method.after_backward(tuned, 1, 10)
        module.l.grad.mul_(1e-6)  # what a clip would do
        method.on_step(tuned, 1, 10)
        shares.append(module.mean_l.clone())
    torch.testing.assert_close(shares[1], 1000 * shares[0])


@pytest.mark.acid("adalora", 4)
def test_a_triplet_may_come_back_before_the_end_of_pruning_and_never_after():
    method = AdaLoRA(rank=4, target_rank=1, every=1, warmup=0.0, settled=0.5, sites=("attn.q",))
    tuned = attach(tiny("bert"), method)
    modules = list(tuned.modules(Triplets).values())

    def step(number, favoured):
        for module in modules:
            with torch.no_grad():
                module.l.copy_(torch.ones(4))
            module.p.grad, module.q.grad = torch.zeros_like(module.p), torch.zeros_like(module.q)
            module.l.grad = torch.zeros(4)
            module.l.grad[favoured] = 10.0**number
        method.after_backward(tuned, number, 20)
        method.on_step(tuned, number, 20)
        return [(m.l != 0).tolist() for m in modules]

    for number in range(1, 7):
        alive = step(number, 0)
    assert not any(row[3] for row in alive), "pruned"
    for number in range(7, 11):
        alive = step(number, 3)
    assert all(row == [False, False, False, True] for row in alive), "back, and the budget has arrived"
    for number in range(11, 21):
        assert step(number, 1) == alive, "settled"


def test_nothing_is_pruned_before_the_warm_up_is_over_and_something_after():
    method = AdaLoRA(rank=4, target_rank=1, every=1, warmup=0.5, settled=0.25)
    tuned = attach(tiny("bert"), method)
    modules = list(tuned.modules(Triplets).values())
    alive = []
    for step in range(1, 21):
        for module in modules:
            with torch.no_grad():
                module.l.fill_(1.0)
            for parameter in (module.p, module.l, module.q):
                parameter.grad = torch.randn_like(parameter)
        method.after_backward(tuned, step, 20)
        method.on_step(tuned, step, 20)
        alive.append(_alive(tuned))
    whole, end = 4 * len(modules), len(modules)
    # The warm-up is steps 1 to 10; 11 to 15 fall by the cubic; the rest is settled.
    falls = [round(end + (whole - end) * (1 - s / 5) ** 3) for s in range(1, 6)]
    assert alive == [whole] * 10 + falls + [end] * 5


def test_it_stores_the_triplets_inside_the_budget_and_those_that_act():
    module = Triplets(3, 5, 4, 1.0)
    with torch.no_grad():
        module.l.copy_(torch.tensor([0.5, 0.0, -2.0, 0.0]))
    module.keep.copy_(torch.tensor([True, True, False, False]))
    stored = module.stored()
    assert stored["l"].tolist() == [0.5, 0.0, -2.0]
    assert torch.equal(stored["p"], module.p.detach()[:, [0, 1, 2]])
    assert torch.equal(stored["q"], module.q.detach()[[0, 1, 2]])
    x, y = torch.randn(2, 3), torch.randn(2, 5)
    before = module.after(x, y)
    module.restore(stored)
    torch.testing.assert_close(module.after(x, y), before)
    assert module.l.numel() == 3 and module.keep.tolist() == [True] * 3


@pytest.mark.acid("adalora", 6)
def test_the_penalty_makes_p_orthogonal():
    def gap(weight):
        tuned = attach(tiny("bert"), AdaLoRA(rank=4, target_rank=2, orthogonality=weight))
        train(tuned, 15, lr=2e-2, decay=0.0)
        return sum(
            float(torch.linalg.vector_norm(g.detach())) for m in tuned.modules(Triplets).values() for g in m.gaps()
        )

    untrained = attach(tiny("bert"), AdaLoRA(rank=4, target_rank=2))
    start = sum(
        float(torch.linalg.vector_norm(g.detach())) for m in untrained.modules(Triplets).values() for g in m.gaps()
    )
    assert gap(1.0) < 0.9 * start
    assert gap(1.0) < gap(0.0)


@pytest.mark.acid("adalora", 5)
def test_a_whole_run_ends_at_the_budget_and_compressing_changes_nothing(tmp_path):
    method = AdaLoRA(rank=6, target_rank=2, every=2)
    model = tiny("bert")
    tuned = attach(model, method)
    train(tuned, 20)
    assert _alive(tuned) == 2 * len(tuned.modules(Triplets))
    before = logits(model)
    tuned.finish()
    assert sum(m.l.numel() for m in tuned.modules(Triplets).values()) == 2 * len(tuned.modules(Triplets))
    assert sum(p.numel() for m in tuned.modules().values() for p in m.parameters()) == method.n_stored(tuned.anatomy)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(model))


def test_the_scale_keeps_the_rank_of_the_start():
    tuned = attach(tiny("bert"), AdaLoRA(rank=6, target_rank=2, alpha=12.0))
    train(tuned, 10)
    tuned.finish()
    assert {m.scale for m in tuned.modules(Triplets).values()} == {2.0}


def test_the_paper_s_penalty_is_the_sum_of_squares():
    method = AdaLoRA(penalty="square", orthogonality=0.5)
    tuned = attach(tiny("bert"), method)
    squares = sum(float(g.detach().square().sum()) for m in tuned.modules(Triplets).values() for g in m.gaps())
    torch.testing.assert_close(float(method.extra_loss(tuned).detach()), 0.5 * squares, rtol=1e-5, atol=0)


def test_a_schedule_without_room_is_refused():
    with pytest.raises(ConfigError, match="their sum must be below 1"):
        AdaLoRA(warmup=0.5, settled=0.5)
    with pytest.raises(ConfigError, match="target_rank 9 is above rank 4"):
        AdaLoRA(rank=4, target_rank=9)

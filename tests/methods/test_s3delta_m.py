"""Sparse structure search: the acid tests of its paper."""

from types import SimpleNamespace

import pytest
import torch
from cells import Trainer
from tiny import inputs, tiny
from torch import nn

from luthier.core import ConfigError
from luthier.methods.hybrid.s3delta_m import Logits, S3DeltaM
from luthier.methods.parts.by_halves import half_of, searched_loss
from luthier.methods.parts.searched import Components, Gates, select
from luthier.surgery import attach

SIZES, BUDGET = [7, 30, 11, 50, 3, 20], 40


def searched_model(total=12, name="bert", **settings):
    model = tiny(name)
    tuned = attach(model, "s3delta_m", **{"share": 0.03, **settings})
    trainer = Trainer(tuned, model, inputs(model), total=total, lr=2e-2)
    model.luthier.train()
    return tuned, trainer


@pytest.mark.acid("s3delta_m", 1)
@pytest.mark.parametrize("beta", [1.0, 0.2])
def test_the_expected_numbers_are_the_budget_at_every_step(beta):
    gates = Logits(SIZES, BUDGET, beta)
    optimiser = torch.optim.Adam([gates.alpha], lr=0.5)
    for step in range(60):
        chances = gates.chances()
        assert float((gates.sizes * chances.detach()).sum()) == pytest.approx(BUDGET, abs=1e-6)
        (chances * torch.randn(6, generator=torch.Generator().manual_seed(step))).sum().backward()
        optimiser.step()
    tuned, trainer = searched_model(12)
    (gates,) = tuned.modules(Gates).values()
    for _ in range(5):
        trainer.step()
        expected = float((gates.sizes * gates.chances().detach()).sum())
        assert expected == pytest.approx(tuned.tuning().method.budget(tuned.anatomy), abs=1e-6)
    assert gates.alpha.detach().std() > 0.01, "it has moved"


@pytest.mark.acid("s3delta_m", 2)
def test_the_plan_is_within_the_budget_and_nothing_more_fits():
    for seed in range(20):
        worth = torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist()
        chosen = select(worth, SIZES, BUDGET)
        left = BUDGET - sum(SIZES[i] for i in chosen)
        assert left >= 0 and all(SIZES[i] > left for i in range(6) if i not in chosen)
    tuned, trainer = searched_model(8)
    trainer.run()
    method = tuned.tuning().method
    tuned.finish()
    sizes = {p.name: p.size for p in method.places(tuned.anatomy)}
    left = method.budget(tuned.anatomy) - sum(sizes[n] for n in method.plan_of(tuned))
    assert left >= 0 and all(size > left for name, size in sizes.items() if name not in method.plan_of(tuned))
    held = sum(p.numel() for m in tuned.modules(Components).values() for p in m.parameters())
    assert held == method.budget(tuned.anatomy) - left, "and nothing else is left on the model"


@pytest.mark.acid("s3delta_m", 3)
def test_a_sum_of_chances_has_no_gradient_and_a_loss_that_differs_has_one():
    gates = Logits(SIZES, BUDGET, 1.0)
    with torch.no_grad():
        gates.alpha.copy_(torch.tensor([0.3, -1.0, 0.5, 0.1, 2.0, -0.4]))
    (zero,) = torch.autograd.grad(gates.chances().sum(), gates.alpha)
    assert float(zero.abs().max()) < 1e-12
    (some,) = torch.autograd.grad((gates.chances() * torch.arange(6)).sum(), gates.alpha)
    assert float(some.abs().max()) > 1e-3


class Planted(Components):
    """One number: its output matters, or not at all."""

    def make(self, site, rank):
        self.lora_w = nn.Parameter(torch.zeros(()))


def planted(n=20, useless=13, second_order=True, steps=150):
    """n places; the loss wants every place's w near 1, but for one, whose output goes nowhere."""
    gates = Logits([1] * n, n // 2, 1.0)
    places = [Planted(SimpleNamespace(d_out=1), {"lora": i}, 1, gates) for i in range(n)]
    weights = [p.lora_w for p in places]
    ids = torch.arange(40).view(20, 2) % 7
    for place in places:
        place.context = SimpleNamespace(memory={}, ids=ids, mask_for=lambda stack: None)
    matters = torch.ones(n)
    matters[useless] = 0.0
    half_seen = torch.randn(20, n, generator=torch.Generator().manual_seed(3)).abs() + 0.5
    labels = torch.zeros(20, dtype=torch.long)
    anatomy = SimpleNamespace()

    def forward():
        given = (gates.z() * torch.stack(weights) * matters * half_seen).sum(-1)  # (rows,)
        two = torch.stack([given, -given], -1) / n
        loss = torch.nn.functional.cross_entropy(two, labels, reduction="sum")
        return SimpleNamespace(loss=loss, logits=two, labels=labels, n_targets=20)

    optimiser = torch.optim.Adam([{"params": weights, "lr": 0.02}, {"params": [gates.alpha], "lr": 0.1}])
    for step in range(steps):
        torch.manual_seed(step)
        gates.draw()
        tuned = SimpleNamespace(anatomy=anatomy)
        result = searched_loss(gates, places[0], weights, forward, tuned, second_order, 0.02)
        optimiser.zero_grad()
        (result.loss / 20).backward()
        optimiser.step()
    return gates


@pytest.mark.acid("s3delta_m", 4)
@pytest.mark.parametrize("second_order", [True, False])
def test_a_useless_place_ends_among_the_last(second_order):
    gates = planted(second_order=second_order)
    chances = gates.chances()
    assert int((chances < chances[13]).sum()) < 2, "in the last tenth of twenty"


@pytest.mark.acid("s3delta_m", 5)
def test_training_anew_starts_as_a_fresh_plan_with_that_seed():
    tuned, trainer = searched_model(8)
    method = tuned.tuning().method
    while trainer.phases.entered < 1:
        before = {n: p.detach().clone() for n, p in tuned.trained().items()}
        trainer.phases.enter(len(trainer.losses) + 1, 8)
        if trainer.phases.entered < 1:
            trainer.step()
    moved = [n for n, p in tuned.trained().items() if "gates" not in n and not torch.equal(p, before[n])]
    assert moved, "the search had moved them"
    model = tiny("bert")
    fresh = attach(model, S3DeltaM(share=0.03, plan=method.plan_of(tuned)))
    wanted = {n: p for n, p in fresh.trained().items() if "head/" not in n}
    kept = {n: p for n, p in tuned.trained().items() if n in wanted}
    assert set(kept) == set(wanted)
    assert all(torch.equal(kept[n], wanted[n]) for n in wanted)
    others = [n for n in tuned.trained() if n not in wanted and "head/" not in n and "gates" not in n]
    assert others and not any(tuned.trained()[n].any() for n in others)


@pytest.mark.acid("s3delta_m", 6)
def test_finite_differences_of_the_search_agree_with_autograd():
    """∇α L_B(w - ξ ∇w L_A(w, α)), by autograd through the step, beside what the search puts together."""
    torch.manual_seed(0)
    gates, n = Logits([1] * 5, 3, 1.0).double(), 5
    gates.z = lambda: gates.chances()  # no noise, in double precision
    with torch.no_grad():
        gates.alpha.copy_(torch.randn(n))
    weights, xi = [nn.Parameter(torch.randn(n, dtype=torch.float64))], 0.5
    x = torch.randn(30, n, dtype=torch.float64)
    labels, ids = (torch.arange(30) % 2), torch.arange(60).view(30, 2)
    half = half_of(ids, None)
    assert 8 < int(half.sum()) < 22

    def logits_of(w, z):
        given = torch.tanh(x * z) @ w
        return torch.stack([given, -given], -1)

    def forward():
        two = logits_of(weights[0], gates.z() if gates.lets_learn else gates.z().detach())
        loss = torch.nn.functional.cross_entropy(two.float(), labels, reduction="sum")
        return SimpleNamespace(loss=loss.double(), logits=two.float(), labels=labels, n_targets=30)

    heard = SimpleNamespace(context=SimpleNamespace(ids=ids, mask_for=lambda stack: None))
    result = searched_loss(gates, heard, weights, forward, SimpleNamespace(anatomy=None), True, xi)
    (found,) = torch.autograd.grad(result.loss / 30, gates.alpha)
    gates.lets_learn = True

    def mean(w, which):
        each = torch.nn.functional.cross_entropy(logits_of(w, gates.chances()), labels, reduction="none")
        return each[half == which].mean()

    (inner,) = torch.autograd.grad(mean(weights[0], 0), weights[0], create_graph=True)
    (exact,) = torch.autograd.grad(mean(weights[0] - xi * inner, 1), gates.alpha)
    (first,) = torch.autograd.grad(mean((weights[0] - xi * inner).detach(), 1), gates.alpha)
    assert float((found - exact).norm() / exact.norm()) < 1e-2
    assert float((first - exact).norm() / exact.norm()) > 2e-2, "the second-order term is what is tested"


def test_the_two_halves_teach_each_its_own_numbers():
    _, trainer = searched_model(12, second_order=False)
    trainer.step()
    trainer.step()
    assert bool(trainer.gradients["gates.alpha"].any())


@pytest.mark.parametrize(("share", "words"), [(1e-6, "the smallest place holds"), (0.9, "all places together hold")])
def test_a_budget_that_leaves_no_choice_is_refused(share, words):
    with pytest.raises(ConfigError, match=words):
        attach(tiny("bert"), S3DeltaM(share=share))
    with pytest.raises(ConfigError, match="no place 'lora:attn"):
        attach(tiny("bert"), S3DeltaM(plan=("lora:attn.z@0",)))

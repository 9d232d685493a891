"""AdaMix: its own tests, beside those that every method passes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from methods.checks import logits, stir
from safetensors.torch import load_file
from tiny import LAYERS, inputs, tiny

from luthier.core import AnatomyError, CompositionError
from luthier.methods.parts.bottleneck import Bottleneck
from luthier.methods.unified.adamix import AdaMix, Mixed, disagreement
from luthier.surgery import METHODS, attach, load, method


@dataclass
class Result:
    loss: Any
    n_targets: int
    logits: Any
    labels: Any


def _forward(model, batch):
    def forward():
        out = model(**batch)
        return Result(out.loss * len(batch["labels"]), len(batch["labels"]), out.logits, batch["labels"])

    return forward


def _step(tuned, how, step_with, seed=0):
    torch.manual_seed(seed)
    tuned.model.luthier.train()
    how.loss(tuned, _forward(tuned.model, inputs(tuned.model))).loss.backward()
    step_with.step()
    step_with.zero_grad(set_to_none=True)


@pytest.mark.acid("adamix", 1)
@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_one_step_moves_one_or_two_experts_of_each_site(form):
    how = AdaMix(form=form, up_experts=4, width=6, rank=3)
    tuned = attach(tiny("bert"), how)
    stir(tuned, 0.1)
    before = {k: {n: p.detach().clone() for n, p in m.named_parameters()} for k, m in tuned.modules(Mixed).items()}
    tuned.calls_hooks = True
    step_with = torch.optim.AdamW(tuned.trained().values(), lr=0.01, weight_decay=0.1)
    _step(tuned, how, step_with)
    for key, module in tuned.modules(Mixed).items():
        for side in ("down", "up"):
            moved = {
                n.split(".")[1]
                for n, p in module.named_parameters()
                if n.startswith(f"{side}.") and not torch.equal(p, before[key][n])
            }
            assert len(moved) in (1, 2)
    state = {id(p) for p in step_with.state}
    still = [p for m in tuned.modules(Mixed).values() for p in m.parameters() if id(p) not in state]
    assert still, "what was not drawn has no moments either"


@pytest.mark.acid("adamix", 2)
def test_draws_are_uniform_and_sites_draw_apart():
    tuned = attach(tiny("bert"), AdaMix(width=4))
    modules = list(tuned.modules(Mixed).values())
    for module in modules:
        module.train()
    torch.manual_seed(0)
    names = [{p.data_ptr(): i for i, e in enumerate(m.down) for p in [e.weight]} for m in modules]
    draws = torch.tensor(
        [[n[m.side("down")["weight"].data_ptr()] for m, n in zip(modules, names, strict=True)] for _ in range(4000)]
    )
    for column in draws.T:
        counts = torch.bincount(column, minlength=4)
        assert float(((counts - 1000) ** 2 / 1000).sum()) < 16.27  # chi-squared, 3 degrees, p = 0.001
    pairs = torch.bincount(draws[:, 0] * 4 + draws[:, 1], minlength=16)
    assert float(((pairs - 250) ** 2 / 250).sum()) < 37.70  # 15 degrees, p = 0.001


def test_one_draw_serves_the_whole_batch():
    tuned = attach(tiny("bert"), AdaMix(width=4))
    stir(tuned)
    module = next(iter(tuned.modules(Mixed).values())).train()
    y = torch.randn(1, 1, 48).expand(5, 7, 48)
    out = module.after(y, y)
    torch.testing.assert_close(out, out[:1, :1].expand_as(out))
    assert len({float(module.after(y, y).detach().sum()) for _ in range(30)}) == 4


@pytest.mark.acid("adamix", 3)
def test_equal_experts_agree_exactly_and_different_ones_do_not():
    model = tiny("bert")
    how = AdaMix(width=4)
    tuned = attach(model, how)
    model.luthier.train()
    forward = _forward(model, inputs(model))
    stir(tuned)
    torch.manual_seed(1)
    apart = how.loss(tuned, forward).loss
    torch.manual_seed(1)
    assert float(apart.detach()) > float(forward().loss.detach())
    for module in tuned.modules(Mixed).values():
        for expert in module.down:
            expert.load_state_dict(module.down[0].state_dict())
    assert torch.equal(how.loss(tuned, forward).loss, forward().loss)


@pytest.mark.parametrize(("ce", "gamma"), [("first", 1.0), ("first", 3.0), ("mean", 0.5)])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_loss_is_the_task_s_plus_gamma_times_half_of_both_divergences(name, ce, gamma):
    model = tiny(name)
    how = AdaMix(width=4, ce=ce, gamma=gamma)
    tuned = attach(model, how)
    stir(tuned)
    model.eval()
    model.luthier.train()
    forward = _forward(model, inputs(model))
    torch.manual_seed(1)
    found = how.loss(tuned, forward)
    torch.manual_seed(1)
    one, two = forward(), forward()
    z1, z2 = one.logits.detach().double(), two.logits.detach().double()
    if name == "llama":
        told = one.labels[:, 1:] != -100
        z1, z2 = z1[:, :-1][told], z2[:, :-1][told]
    p1, p2 = z1.softmax(-1), z2.softmax(-1)
    apart = 0.5 * float((p1 * (p1 / p2).log()).sum() + (p2 * (p2 / p1).log()).sum())
    assert apart > 1e-3
    task = float(one.loss.detach()) if ce == "first" else float((one.loss + two.loss).detach()) / 2
    assert abs(float(one.loss.detach()) - float(two.loss.detach())) > 1e-3
    assert abs(float(found.loss.detach()) - (task + gamma * apart)) < 1e-4 * (task + gamma * apart)
    assert torch.equal(found.logits, one.logits)


def test_disagreement_is_the_symmetric_divergence_of_each_kind_of_target():
    torch.manual_seed(0)
    z1, z2 = torch.randn(4, 3), torch.randn(4, 3)
    p1, p2 = z1.softmax(-1), z2.softmax(-1)
    both = (p1 * (p1 / p2).log() + p2 * (p2 / p1).log()).sum() / 2
    torch.testing.assert_close(disagreement(z1, z2, torch.zeros(4).long(), shifted=False), both)
    one = disagreement(z1[:, :1], z2[:, :1], torch.zeros(4), shifted=False)
    torch.testing.assert_close(one, (z1[:, 0] - z2[:, 0]).square().sum())
    labels = torch.tensor([[-100, 1, 2, -100]])
    tokens = disagreement(z1[None], z2[None], labels, shifted=True)
    torch.testing.assert_close(tokens, disagreement(z1[:2], z2[:2], None, shifted=False))
    words = disagreement(z1[None], z2[None], labels, shifted=False)
    torch.testing.assert_close(words, disagreement(z1[1:3], z2[1:3], None, shifted=False))
    many = disagreement(z1, z2, torch.zeros(4, 3), shifted=False)
    s1, s2 = z1.sigmoid(), z2.sigmoid()
    bernoulli = ((s1 - s2) * (z1 - z2)).mean(-1).sum() / 2
    torch.testing.assert_close(many, bernoulli)


def test_each_side_learns_from_the_other_held_constant():
    z1, z2 = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    g1, g2 = torch.autograd.grad(disagreement(z1, z2, None, shifted=False), [z1, z2])
    torch.testing.assert_close(g1, (z1.softmax(-1) - z2.softmax(-1)) / 2)
    torch.testing.assert_close(g2, -g1)


@pytest.mark.acid("adamix", 5)
@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_one_expert_without_agreement_is_the_plain_method_bit_for_bit(form):
    how = AdaMix(form=form, experts=1, gamma=0.0, width=5, rank=3, alpha=6.0)
    mixed = attach(tiny("bert"), how)
    plain = attach(tiny("bert"), "lora", rank=3, alpha=6.0) if form == "lora" else attach(tiny("bert"), how)
    if form == "adapter":
        for module in plain.modules(Mixed).values():
            one = Bottleneck(48, 5, "gelu")
            one.load_state_dict(module.stored())
            module.__dict__["side"] = lambda name, one=one: dict(getattr(one, name).named_parameters())
            module.__dict__["parameters_of"] = list(one.parameters())
    else:
        for key, module in plain.modules().items():
            stored = mixed.modules()[key].stored()
            assert all(torch.equal(stored[n], t) for n, t in module.stored().items()), "the same start"
    groups = []
    for tuned in (mixed, plain):
        parameters = [p for n, p in tuned.trained().items()]
        for module in tuned.modules(Mixed).values():
            parameters += module.__dict__.get("parameters_of", [])
        tuned.calls_hooks = True
        groups.append(torch.optim.SGD(parameters, lr=0.1))
    for seed in range(3):
        _step(mixed, how, groups[0], seed)
        _step(plain, how if form == "adapter" else plain.tuning().method, groups[1], seed)
    assert torch.equal(logits(mixed.model), logits(plain.model))


@pytest.mark.acid("adamix", 4, 6)
@pytest.mark.parametrize("form", ["adapter", "lora"])
def test_what_is_stored_is_the_mean_and_a_plain_module(form, tmp_path):
    how = AdaMix(form=form, width=5, rank=3, up_experts=2)
    model = tiny("bert")
    tuned = attach(model, how)
    stir(tuned)
    key, module = next(iter(tuned.modules(Mixed).items()))
    mean = torch.stack([e.weight for e in module.down]).mean(0)
    before = logits(model)
    tuned.finish()
    assert torch.equal(logits(model), before), "in evaluation the mean already served"
    assert sum(p.numel() for m in tuned.modules(Mixed).values() for p in m.parameters()) == how.n_stored(tuned.anatomy)
    assert torch.equal(module.down[0].weight, mean)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), before)
    file = load_file(tmp_path / "tuning" / "tuning.safetensors")
    mine = {n.removeprefix(f"{key}."): t for n, t in file.items() if n.startswith(f"{key}.")}
    if form == "adapter":
        one = Bottleneck(48, 5, "gelu")
        one.load_state_dict(mine)  # a plain adapter: names and shapes
    else:
        other = attach(tiny("bert"), "lora", rank=3)
        other.modules()[key].load_state_dict(mine)


def test_experts_start_apart():
    module = next(iter(attach(tiny("bert"), AdaMix()).modules(Mixed).values()))
    assert len({float(e.weight.detach().sum()) for e in module.down}) == 4


@pytest.mark.parametrize(("settings", "starts"), [({}, False), ({"zero_init": True}, True), ({"form": "lora"}, True)])
def test_where_it_starts(settings, starts):
    model = tiny("llama")
    before = logits(model)
    tuned = attach(model, AdaMix(**settings))
    assert tuned.tuning().method.starts_at_base == starts
    assert torch.allclose(logits(model), before, atol=1e-6) == starts


def test_counts():
    how = AdaMix(width=5, experts=3)
    assert attach(tiny("bert"), how).n_trained() == LAYERS * (3 * (48 * 5 + 5) + 5 * 48 + 48)
    lora = AdaMix(form="lora", rank=2, experts=3, up_experts=2)
    tuned = attach(tiny("llama"), lora)
    assert tuned.n_trained() == lora.n_params(tuned.anatomy) == LAYERS * 2 * (3 * 48 + 2 * 48 + 3 * 48 + 2 * 24)


def test_checkpointing_replays_the_draw():
    grads = []
    for checkpointed in (False, True):
        model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
        how = AdaMix(width=4)
        tuned = attach(model, how)
        stir(tuned)
        model.train()
        if checkpointed:
            model.activation_checkpointing_enable()
        torch.manual_seed(5)
        how.loss(tuned, _forward(model, inputs(model))).loss.backward()
        grads.append({n: p.grad for n, p in tuned.trained().items()})
    for name, grad in grads[0].items():
        other = grads[1][name]
        assert (grad is None) == (other is None)
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-6)


def test_a_learnt_mean_trains_its_weights_alone():
    how = AdaMix(width=4, learn_soup=0.5, gamma=1.0)
    tuned = attach(tiny("bert"), how)
    assert tuned.n_trained() == how.n_params(tuned.anatomy)
    stir(tuned)
    tuned.calls_hooks = True
    step_with = torch.optim.AdamW(tuned.trained().values(), lr=0.05)
    _step(tuned, how, step_with)
    how.on_step(tuned, 5, 10)
    module = next(iter(tuned.modules(Mixed).values()))
    experts = [e.weight.detach().clone() for e in module.down]
    scores = module.down_scores.detach().clone()
    for seed in range(3):
        _step(tuned, how, step_with, seed)
    assert all(torch.equal(e.weight, old) for e, old in zip(module.down, experts, strict=True))
    assert not torch.equal(module.down_scores, scores)
    before = logits(tuned.model)
    tuned.finish()
    torch.testing.assert_close(logits(tuned.model), before)


def test_what_is_refused():
    with pytest.raises(CompositionError, match="neither paper"):
        method("adamix+propetl")
    with pytest.raises(AnatomyError, match="is no projection"):
        attach(tiny("bert"), AdaMix(form="lora", sites=("ffn_out",)))


def test_the_page_says_what_is_the_authors_only_where_it_is_asked_for():
    page = " ".join(METHODS.card("adamix").page.split())
    assert "weighs the agreement by 100" in page and "gamma=100" in page
    assert 'unless trunk_dropout = "on"' in page

"""GLoRA: its own tests, beside those that every method passes."""

import pytest
import torch
from little import little_spec
from methods.checks import logits, stir
from methods.sizes import anatomy_of
from tiny import inputs, tiny
from torch import nn

from luthier import predict
from luthier import train as run
from luthier.anatomy import Anatomy
from luthier.core import ConfigError
from luthier.methods.reparameterised.glora import WAYS, General, cost
from luthier.surgery import Base, attach, load, method

FIXED = {"a": "none", "b": "none", "c": "none", "d": "none", "e": "none"}


def places(tuned):
    return [m for m in tuned.modules().values() if isinstance(m, General)]


def stirred(name="bert", **settings):
    tuned = attach(tiny(name), method("glora", {"rank": 2, **settings}))
    stir(tuned)
    tuned.model.eval()
    return tuned


def layer(*, bias):
    """A linear layer as a place of a model, and GLoRA's numbers at it, nowhere zero."""
    torch.manual_seed(0)
    site = Anatomy.read(tiny("bert")).sites("ffn.up@0")[0]
    linear = nn.Linear(site.d_in, site.d_out, bias=bias).requires_grad_(False)
    base = Base(linear, site if bias else site.__class__(**{**vars_of(site), "bias": None}))
    made = General(base, 2, ("search",) * 5).eval()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return linear, made


def vars_of(site):
    return {f: getattr(site, f) for f in site.__dataclass_fields__}


@pytest.mark.acid("glora", 1)
def test_with_nothing_chosen_it_is_the_base():
    tuned = stirred()
    batch = inputs(tuned.model)
    for module in places(tuned):
        module.take(("none",) * 5)
    with tuned.base_only() as base:
        wanted = logits(base, batch)
    heads = {n: t for n, t in tuned.trained().items() if n.startswith("head")}
    assert heads  # the head is the base's own head moved, so compare with it in place
    for module in places(tuned):
        module.take(("low_rank", "none", "none", "none", "none"))
    moved = logits(tuned.model, batch)
    for module in places(tuned):
        module.take(("none",) * 5)
    still = logits(tuned.model, batch)
    assert not torch.allclose(moved, still)
    alone = attach(tiny("bert"), "head_only")
    with torch.no_grad():
        for one, other in zip(alone.trained().values(), heads.values(), strict=True):
            one.copy_(other)
    alone.model.eval()
    assert torch.equal(still, logits(alone.model, batch)) and wanted.shape == still.shape


@pytest.mark.acid("glora", 2)
def test_b_alone_as_a_product_is_lora_with_a_scale_of_one():
    tuned = stirred(**{**FIXED, "b": "low_rank"})
    lora = attach(tiny("bert"), method("lora", {"rank": 2, "alpha": 2.0}))
    assert tuned.tuning().method.n_params(tuned.anatomy) == lora.tuning().method.n_params(lora.anatomy)
    with torch.no_grad():
        for ours, theirs in zip(tuned.modules().values(), lora.modules().values(), strict=True):
            theirs.a.copy_(ours.terms["b"].up)
            theirs.b.copy_(ours.terms["b"].down)
        for name, tensor in tuned.trained().items():
            if name.startswith("head"):
                lora.trained()[name].copy_(tensor)
    lora.model.eval()
    batch = inputs(tuned.model)
    assert torch.allclose(logits(tuned.model, batch), logits(lora.model, batch), atol=1e-5)


@pytest.mark.acid("glora", 3)
@pytest.mark.parametrize("bias", [True, False])
def test_merged_it_is_the_path_for_twenty_paths(bias):
    linear, made = layer(bias=bias)
    x = torch.randn(5, linear.in_features)
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        path = tuple(ways[int(torch.randint(len(ways), (), generator=draw))] for ways in WAYS.values())
        made.take(path)
        with torch.no_grad():
            weight, flat = made.merged(linear.weight.clone(), None if not bias else linear.bias.clone())
            merged = nn.functional.linear(x, weight, flat)
            assert torch.allclose(merged, made.after(x, linear(x)), atol=1e-5), path
            a, b, c, d, e = (made.terms[t].value(way) for t, way in zip(WAYS, path, strict=True))
            own = torch.zeros(linear.out_features) if not bias else linear.bias
            zero = torch.zeros(1, 1)
            by_hand = linear.weight * (1 + (zero if a is None else a)) + (zero if b is None else b)
            rest = own * (1 + (zero if d is None else d)[:, 0]) + (zero if e is None else e)[:, 0]
            rest = rest + (0 if c is None else (linear.weight @ c)[:, 0])
            assert torch.allclose(merged, x @ by_hand.T + rest, atol=1e-5), path


@pytest.mark.acid("glora", 4)
def test_the_ways_of_a_term_share_their_numbers():
    _, made = layer(bias=True)
    term = made.terms["a"]
    before = term.value("vector").detach().clone()
    with torch.no_grad():
        term.down[:, 0] += 1
    assert torch.equal(term.value("vector"), before + 1) and torch.equal(term.value("constant"), (before + 1)[:1])
    assert torch.equal(term.value("low_rank"), term.down @ term.up)


@pytest.mark.acid("glora", 5)
@pytest.mark.parametrize("budget", [0.15, 0.5])
def test_what_is_found_keeps_to_the_budget_and_is_no_worse_than_chance(budget):
    tuned = stirred(budget=budget, population=12, generations=3, parents=4)
    batch = inputs(tuned.model)
    part = tuned.tuning().method
    before = {n: t.clone() for n, t in tuned.trained().items()}
    part.conclude(tuned, [lambda: tuned.model(**batch).loss])
    held = sum(m.cost(m.ways()) for m in places(tuned))
    assert held <= budget * part.n_params(tuned.anatomy)
    assert all(torch.equal(t, before[n]) for n, t in tuned.trained().items())
    with torch.no_grad():
        found = float(tuned.model(**batch).loss)
        paths = [m.ways() for m in places(tuned)]
        part.conclude(tuned, [lambda: tuned.model(**batch).loss])
        assert [m.ways() for m in places(tuned)] == paths  # draws are named: the same again
        torch.manual_seed(3)
        losses = []
        for one in part._children(places(tuned), budget * part.n_params(tuned.anatomy), 12, []):
            for module, path in zip(places(tuned), one, strict=True):
                module.take(path)
            losses.append(float(tuned.model(**batch).loss))
    assert found < sum(losses) / len(losses) and found <= min(losses) + 1e-6


def test_a_step_draws_a_way_for_each_place_and_an_answer_takes_the_chosen_one():
    tuned = attach(tiny("bert"), method("glora", {"rank": 2}))
    part = tuned.tuning().method
    seen = set()
    for step in range(40):
        torch.manual_seed(step)
        part.before_step(tuned, step + 1, 40)
        tuned.model.train()
        seen |= {(t, way) for m in places(tuned) for t, way in zip(WAYS, m.ways(), strict=True)}
        tuned.model.eval()
        assert all(m.ways() == ("low_rank", "low_rank", "low_rank", "vector", "vector") for m in places(tuned))
    assert seen == {(t, way) for t, ways in WAYS.items() for way in ways}


def test_counts_are_those_of_the_catalogue():
    assert method("glora", {"sites": ("*",)}).n_params(anatomy_of("roberta")) == 1_825_056
    assert cost(10, 6, 2, ("vector", "constant", "low_rank", "constant", "none")) == 10 + 1 + 2 * 7 + 1
    for path in ({"a": "vector"}, {"b": "constant"}, {"c": "vector", "e": "vector"}):
        tuned = attach(tiny("bert"), method("glora", {**FIXED, **path}))
        assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)


def test_the_choice_is_saved(tmp_path):
    tuned = stirred()
    for i, module in enumerate(places(tuned)):
        module.take(("vector", "low_rank", "none", "constant", "vector") if i % 2 else ("none",) * 5)
    batch = inputs(tuned.model)
    tuned.save(tmp_path / "tuning")
    again = load(tiny("bert"), tmp_path / "tuning")
    assert [m.ways() for m in places(again)] == [m.ways() for m in places(tuned)]
    assert torch.equal(logits(again.model, batch), logits(tuned.model, batch))


def test_in_training_mode_the_ways_of_answers_are_merged_not_those_of_the_last_step():
    tuned = stirred()
    batch = inputs(tuned.model)
    wanted = logits(tuned.model, batch)
    torch.manual_seed(1)
    tuned.tuning().method.before_step(tuned, 1, 10)
    tuned.model.train()
    assert any(m.ways() != m.answers() for m in places(tuned))
    merged = tuned.merge().eval()
    torch.testing.assert_close(logits(merged, batch), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cast", ["base", "both"])
def test_in_bf16_it_merges_to_what_it_answered(cast):
    tuned = attach(tiny("bert").to(torch.bfloat16), method("glora", {"rank": 2, "sites": ("*",)}))
    stir(tuned)
    if cast == "both":
        tuned.model.to(torch.bfloat16)
    batch = inputs(tuned.model)
    wanted = logits(tuned.model, batch)
    torch.testing.assert_close(logits(tuned.merge(), batch).float(), wanted.float(), rtol=0.05, atol=0.05)


def test_a_run_searches_and_answers(tmp_path):
    small = {"population": 4, "generations": 1, "parents": 2, "data": 0.5, "rank": 2}
    result = run(little_spec(tmp_path, "glora", settings=small, out=str(tmp_path / "run")))
    assert "probabilities" in predict(result.path, texts=["good w5"])[0]
    chosen = {m.ways() for m in places(result.tuned)}
    assert chosen != {("low_rank", "low_rank", "low_rank", "vector", "vector")}


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="no bias to scale"):
        attach(tiny("t5"), method("glora", {"d": "vector"}))
    with pytest.raises(ConfigError, match="all none"):
        method("glora", FIXED)
    tuned = attach(tiny("bert"), method("glora", {"budget": 0.001, "a": "low_rank"}))
    with pytest.raises(ConfigError, match="so little"):
        tuned.tuning().method.conclude(tuned, [lambda: tuned.model(**inputs(tuned.model)).loss])
    with pytest.raises(ConfigError, match="no rows to search by"):
        tuned.tuning().method.conclude(tuned, [])

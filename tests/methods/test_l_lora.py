"""L-LoRA to first order of the whole model: against torch's own derivative, in sums, in training and in generation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_spec
from methods.checks import attach_double, goes_on_from_its_cache_alone, logits, stir, train
from tiny import inputs, tiny
from torch import Tensor
from torch.func import functional_call, jvp

from luthier import kernels
from luthier.core import AnatomyError, CannotMerge, CompositionError, ConfigError, ModelError
from luthier.methods.parts.low_rank import ThinUpdate
from luthier.surgery import attach, load, method, to_peft
from luthier.workflow import Predictor, evaluate
from luthier.workflow import train as run

MODEL = {"scope": "model", "rank": 3}


def states_of_lora(arch: str, settings: dict[str, Any], moved: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Last hidden states of lora at its start plus torch's derivative of them along what has moved."""
    tuned = attach_double(arch, "lora", "base", rank=3, alpha=32.0, **settings)
    modules = tuned.modules(ThinUpdate)
    names = {id(p): n for n, p in tuned.model.named_parameters()}
    start = {names[id(p)]: p.detach() for m in modules.values() for p in (m.a, m.b)}
    way = {names[id(p)]: d for k, m in modules.items() for p, d in zip((m.a, m.b), moved[k], strict=True)}
    batch = {k: v for k, v in inputs(tuned.model).items() if k != "labels"}

    def states(numbers: dict[str, Tensor]) -> Tensor:
        with kernels.plain(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out: Tensor = functional_call(tuned.model, numbers, (), batch, tie_weights=False)[0]
        return out

    tuned.model.eval()
    with torch.no_grad():
        value, derivative = jvp(states, (start,), (way,))
    return value + derivative


@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("start", ["zero", "svd"])
def test_the_last_states_are_the_base_s_and_torch_s_derivative_along_what_has_moved(arch: str, start: str) -> None:
    settings = {"start": start, "sites": ("attn.q", "attn.v", "attn.o", "ffn.up")}
    both = {} if start == "zero" else {"train_a": True}
    tuned = attach_double(arch, "l_lora", "base", scope="model", rank=3, **settings, **both)
    modules = tuned.modules(ThinUpdate)
    before = {k: (m.a.detach().clone(), m.b.detach().clone()) for k, m in modules.items()}
    with torch.no_grad():
        for module in modules.values():
            module.b += 0.3 * torch.randn_like(module.b)
            module.a += 0.3 * torch.randn_like(module.a) * (start != "zero")
    moved = {k: (m.a.detach() - before[k][0], m.b.detach() - before[k][1]) for k, m in modules.items()}
    tuned.model.eval()
    with torch.no_grad():
        batch = {k: v for k, v in inputs(tuned.model).items() if k != "labels"}
        found = tuned.model(**batch)[0]
    torch.testing.assert_close(found, states_of_lora(arch, settings, moved), rtol=1e-9, atol=1e-9)


@pytest.mark.acid("l_lora", 1)
@pytest.mark.parametrize("arch", ["llama", "gpt2", "bert"])
def test_what_tunings_add_to_the_states_adds_up_to_first_order_of_the_model_and_not_by_layer(arch: str) -> None:
    apart = {}
    for scope in ("model", "layer"):
        tuned = attach_double(arch, "l_lora", scope=scope, rank=3, sites=("*",))
        modules = list(tuned.modules(ThinUpdate).values())
        draw = torch.Generator().manual_seed(2)
        one, two = ([torch.randn(m.b.shape, generator=draw, dtype=torch.float64) for m in modules] for _ in range(2))
        batch = {k: v for k, v in inputs(tuned.model).items() if k != "labels"}
        tuned.model.eval()

        @torch.no_grad()
        def at(a: float, b: float, made: Any = (tuned, modules, one, two, batch)) -> Tensor:
            tuned, modules, one, two, batch = made
            for module, x, y in zip(modules, one, two, strict=True):
                module.b.copy_(a * x + b * y)
            out: Tensor = tuned.model(**batch)[0]
            return out

        base, first, second, both = at(0, 0), at(1, 0), at(0, 1), at(0.7, -0.4)
        wanted = base + 0.7 * (first - base) - 0.4 * (second - base)
        apart[scope] = float((both - wanted).abs().max() / (both - base).abs().max())
    assert apart["model"] < 1e-6  # Llama's norms compute in fp32
    assert apart["layer"] > 1e-2


def test_gradients_are_those_of_the_sum_and_a_has_none() -> None:
    tuned = attach_double("gpt2", "l_lora", "lm", **MODEL)
    stir(tuned)
    batch = inputs(tuned.model)
    tuned.model.eval()

    modules = list(tuned.modules(ThinUpdate).values())
    weights = torch.randn(tuned.model(**batch).logits.shape, dtype=torch.float64)
    (tuned.model(**batch).logits * weights).mean().backward()
    for module in modules:
        way = torch.randn_like(module.b)
        wanted, found = float((way * module.b.grad).sum()), []
        for size in (1e-3, -2e-3):
            with torch.no_grad():
                module.b += size * way
                found.append(float((tuned.model(**batch).logits * weights).mean()))
        with torch.no_grad():
            module.b += 1e-3 * way
        assert abs((found[0] - found[1]) / 2e-3 - wanted) < 1e-9  # it is affine in B, so the step may be large
    assert all(m.a.grad is None and not m.a.requires_grad for m in tuned.modules(ThinUpdate).values())


def test_it_starts_at_the_base_learns_and_saved_computes_the_same(tmp_path: Path) -> None:
    model = tiny("llama", "lm")
    plain = logits(model)
    tuned = attach(model, "l_lora", **MODEL)
    torch.testing.assert_close(logits(tuned.model), plain, rtol=1e-5, atol=1e-6)
    losses = train(tuned, 12, lr=3e-2)
    assert losses[-1] < losses[1] - 0.1
    before = logits(tuned.model)
    assert (before - plain).abs().max() > 1e-2
    tuned.save(tmp_path / "t")
    again = load(tiny("llama", "lm"), tmp_path / "t")
    assert torch.equal(logits(again.model), before)
    with torch.inference_mode():
        torch.testing.assert_close(again.model(**inputs(again.model)).logits, before)
    tuned.remove("default")
    assert torch.equal(logits(tuned.model), plain)


@pytest.mark.parametrize("lazy", [True, False])
def test_it_goes_on_from_its_cache_and_refuses_another(lazy: bool) -> None:
    tuned = attach(tiny("llama", "lm"), "l_lora", **MODEL)
    stir(tuned)
    tuned.model.eval()
    goes_on_from_its_cache_alone(tuned, lazy=lazy)
    ids = torch.randint(3, 131, (2, 5), generator=torch.Generator().manual_seed(1))
    for more in ({}, {"num_beams": 3}):
        found = [
            tuned.model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=kept, **more)
            for kept in (True, False)
        ]
        assert torch.equal(*found)


def test_what_cannot_carry_a_derivative_is_refused(tmp_path: Path) -> None:
    model = tiny("llama", "lm")
    tuned = attach(model, "l_lora", **MODEL)
    stir(tuned)
    with pytest.raises(CannotMerge):
        tuned.merge()
    with pytest.raises(CannotMerge, match="first order of the whole model"):
        to_peft(tuned, tmp_path / "peft")
    tuned.save(tmp_path / "t")
    with pytest.raises(ConfigError, match="first order of the whole model"):
        attach(tiny("llama", "lm"), "lorahub", sources=[tmp_path / "t"])
    with pytest.raises(CompositionError, match="scope=model"):
        tuned.add("lora", name="other")
    with pytest.raises(CompositionError, match="scope=model"):
        method("l_lora+bitfit", {"scope": "model"})
    tuned.checkpoint_activations()
    model.train()
    with pytest.raises(ModelError, match="checkpointing"):
        model(**inputs(model))
    model.eval()
    assert logits(model).isfinite().all()
    with pytest.raises(AnatomyError, match="two"):
        attach(tiny("t5"), "l_lora", **MODEL)
    with pytest.raises(AnatomyError, match="last hidden states"):
        attach(tiny("llama", "lm"), "l_lora", scope="model", sites=("head",))
    with pytest.raises(ConfigError, match="train_a"):
        method("l_lora", {"train_a": True})


def test_by_layer_with_a_start_in_the_weight_both_move_and_the_update_is_linear_in_them() -> None:
    tuned = attach_double("llama", "l_lora", start="svd", train_a=True, rank=3)
    module = next(iter(tuned.modules(ThinUpdate).values()))
    da, db = torch.randn_like(module.a), torch.randn_like(module.b)
    found = []
    for a, b in ((1.0, 0.0), (0.0, 1.0), (2.0, -3.0)):
        with torch.no_grad():
            module.a.copy_(module.a0 + a * da)
            module.b.copy_(module.b0 + b * db)
        found.append(module.merged(torch.zeros(len(module.b), module.a.shape[1], dtype=torch.float64), None)[0])
    assert found[0].any() and found[1].any()
    torch.testing.assert_close(found[2], 2 * found[0] - 3 * found[1])


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_of_it_trains_and_is_scored_and_read_again(kind: str, tmp_path: Path) -> None:
    result = run(little_spec(tmp_path, "l_lora", kind, settings={"scope": "model", "rank": 3}, steps=8))
    read = Predictor(result.path)
    assert any(m.b.any() for m in read.tuned.modules(ThinUpdate).values())
    rows = next(tmp_path.glob("*.csv"))
    assert evaluate(result.path, str(rows)).scores["loss"] > 0

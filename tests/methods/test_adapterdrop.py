"""AdapterDrop: the acid tests of its paper, beside those that every method passes."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.checks import counted, logits, stir, train
from methods.sizes import anatomy_of
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.parts.behind import Behind
from luthier.surgery import attach, load, method
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests


def dropped(tuned):
    """Layers whose adapter does nothing now: those that change nothing when their numbers change."""
    return [plug.site.layer for s in tuned.edited.sockets() for plug in s.plugs if plug.rests]


def part(tuned):
    return tuned.tuning("default").method.parts()[-1]


def test_counts_are_those_of_the_catalogue():
    assert counted("adapterdrop") == 894_528
    assert counted("adapterdrop", training="specialised", without=5) == 521_808
    assert counted("lora+adapterdrop", training="specialised", without=3) * 12 == counted("lora") * 9
    wide = counted("sequential_adapter+adapterdrop", training="specialised", without=11, train_norms=False)
    assert wide * 12 == counted("sequential_adapter", train_norms=False)


@pytest.mark.acid("adapterdrop", 1)
def test_how_many_layers_do_without_is_uniform_over_the_steps():
    tuned = attach(tiny("bert"), "adapterdrop")
    torch.manual_seed(0)
    seen = Counter()
    for step in range(1, 2001):
        part(tuned).before_step(tuned, step, 2000)
        found = dropped(tuned)
        assert found == list(range(len(found))), "the bottom layers, and no others"
        seen[len(found)] += 1
        part(tuned).on_step(tuned, step, 2000)
        assert dropped(tuned) == []
    assert set(seen) == {0, 1, 2}
    chi = sum((n - 2000 / 3) ** 2 / (2000 / 3) for n in seen.values())
    assert chi < 13.8, "one in a thousand with two degrees of freedom"


@pytest.mark.acid("adapterdrop", 2)
@pytest.mark.parametrize("n", [0, 1, 2])
def test_below_the_lowest_that_acts_nothing_wants_a_gradient(n):
    tuned = attach(tiny("bert"), "adapterdrop")
    stir(tuned)
    part(tuned).leave_out(tuned, n)
    wanted = []
    blocks = [tuned.edited.modules[b.path] for b in tuned.anatomy.blocks]
    handles = [
        b.register_forward_hook(
            lambda m, a, out: wanted.append((out[0] if isinstance(out, tuple) else out).requires_grad)
        )
        for b in blocks
    ]
    tuned.model(**inputs(tuned.model)).loss.backward()
    for handle in handles:
        handle.remove()
    assert wanted == [i >= n for i in range(3)]
    moved = [any(p.grad is not None for p in m.parameters()) for m in tuned.modules(Behind).values()]
    assert moved == wanted


@pytest.mark.acid("adapterdrop", 3)
def test_specialised_it_makes_adapters_in_the_upper_layers_alone(tmp_path):
    tuned = attach(tiny("bert"), "adapterdrop", training="specialised", without=2)
    assert list(tuned.modules(Behind)) == ["pfeiffer_adapter:ffn_out@2"]
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    stir(tuned)
    tuned.save(tmp_path / "t")
    again = tiny("bert")
    load(again, tmp_path / "t")
    assert torch.equal(logits(again), logits(tuned.model))
    both = attach(tiny("t5"), "adapterdrop", training="specialised", without=1)
    assert list(both.modules(Behind)) == [
        f"pfeiffer_adapter:ffn_out@{place}" for place in ("encoder.1", "encoder.2", "decoder.1")
    ]


@pytest.mark.acid("adapterdrop", 4)
def test_where_no_layer_does_without_it_is_the_plain_adapter():
    plain, robust = attach(tiny("bert"), "pfeiffer_adapter"), attach(tiny("bert"), "adapterdrop")
    for one, other in zip(plain.modules(Behind).values(), robust.modules(Behind).values(), strict=True):
        one.load_state_dict(other.state_dict())
    stir(plain)
    stir(robust)
    assert torch.equal(logits(plain.model), logits(robust.model))
    part(robust).leave_out(robust, 2)
    for key, module in plain.modules(Behind).items():
        if key != "ffn_out@2":
            torch.nn.init.zeros_(module.up.weight)
            torch.nn.init.zeros_(module.up.bias)
    torch.testing.assert_close(logits(plain.model), logits(robust.model), rtol=1e-5, atol=1e-6)


def test_without_is_what_answers_do_and_a_saved_tuning_remembers(tmp_path):
    tuned = attach(tiny("bert"), "lora+adapterdrop", without=1)
    train(tuned, 3)
    assert set(dropped(tuned)) == {0}
    expected = logits(tuned.model)
    tuned.save(tmp_path / "t")
    model = tiny("bert")
    again = load(model, tmp_path / "t")
    assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(again.merge()), expected, rtol=1e-5, atol=1e-5)
    part(tuned).leave_out(tuned, 0)
    assert not torch.allclose(logits(tuned.model), expected, atol=1e-5)
    with tuned.rows(["default", None, "default"]):
        mixed = logits(tuned.model)
    torch.testing.assert_close(mixed[[0, 2]], logits(tuned.model)[[0, 2]], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_rows_of_different_tunings_keep_their_layers(n):
    tuned = attach(tiny("llama"), "lora+adapterdrop")
    tuned.add(method("lora"), name="other", seed=1)
    stir(tuned)
    part(tuned).leave_out(tuned, n)
    tuned.model.eval()
    alone = {}
    for name in ("default", "other"):
        tuned.activate(name)
        alone[name] = logits(tuned.model)
    with tuned.rows(["default", "other", "default"]):
        mixed = logits(tuned.model)
    for i, name in enumerate(("default", "other", "default")):
        torch.testing.assert_close(mixed[i], alone[name][i], rtol=1e-4, atol=2e-5)


def test_what_rests_neither_moves_nor_decays():
    tuned = attach(tiny("bert"), "adapterdrop")
    stir(tuned)
    low = tuned.modules(Behind)["pfeiffer_adapter:ffn_out@0"]
    before = low.down.weight.detach().clone()
    method_part = part(tuned)
    method_part.before_step(tuned, 1, 1)
    method_part.leave_out(tuned, 2)
    learner = torch.optim.AdamW(tuned.trained().values(), lr=0.1, weight_decay=0.5)
    tuned.calls_hooks = True
    tuned.model(**inputs(tuned.model)).loss.backward()
    learner.step()
    assert torch.equal(low.down.weight, before)


def test_a_stopped_run_goes_on_to_the_bit(tmp_path):
    spec = replace(little_spec(tmp_path, "lora"), method="lora+adapterdrop", settings={"rank": 3}, steps=6)
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (1, 4):
        run(replace(spec, out=str(tmp_path / f"at-{stop}")), stop_at=stop)
        resume(tmp_path / f"at-{stop}")
        assert run_digests(tmp_path / f"at-{stop}") == run_digests(tmp_path / "whole")


def test_what_leaves_nothing_is_refused():
    with pytest.raises(ConfigError, match="leaves no layer out with without=0"):
        method("adapterdrop", {"training": "specialised"})
    with pytest.raises(ConfigError, match=r"adapterdrop\.without: 3 of 3 layers leave none"):
        attach(tiny("bert"), "adapterdrop", without=3)
    with pytest.raises(CompositionError, match="attach nothing to a layer"):
        method("bitfit+adapterdrop").n_params(anatomy_of("bert"))
    with pytest.raises(CompositionError, match="cannot be counted by another modifier"):
        method("lora+adapterdrop+sparse_adapter", {"training": "specialised", "without": 1})

"""LoRAHub: the acid tests of its paper, beside those that every method passes."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from little import little_spec
from methods.checks import counted, logits, stir, train
from methods.saved import saved
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import ConfigError
from luthier.methods.reparameterised.lorahub import SummedUpdate, compass
from luthier.surgery import attach, load, open_source
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

LORA = {"rank": 3, "alpha": 6.0}


def hub(places, arch="gpt2", **settings):
    tuned = attach(tiny(arch), "lorahub", sources=places, **settings)
    return tuned, list(tuned.modules(SummedUpdate).values())


def sources(folder, n, arch="gpt2", words="lora"):
    return [saved(folder, seed, words, arch, **LORA) for seed in range(n)]


def searched(tuned, *batches):
    """Let it search on what the model itself computes of the batches."""
    given = [lambda b=b: tuned.model(**b).loss for b in batches or (inputs(tuned.model),)]
    tuned.tuning().method.prepare(tuned, given)


def test_one_lora_is_stored_and_none_trains():
    assert counted("lorahub", rank=8) == 0
    assert counted("lorahub", rank=8, train=True) == 294_912


def test_it_starts_as_the_base_model(tmp_path):
    tuned, _ = hub(sources(tmp_path, 2))
    assert torch.equal(logits(tuned.model), logits(tiny("gpt2")))


@pytest.mark.acid("lorahub", 1)
@pytest.mark.parametrize("words", ["lora", "rslora"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_one_hot_weights_are_that_module_to_the_bit(tmp_path, which, words):
    places = sources(tmp_path, 3, words=words)
    tuned, modules = hub(places)
    with torch.no_grad():
        for module in modules:
            module.weigh(torch.eye(3)[which])
    one = tiny("gpt2")
    load(one, places[which])
    assert torch.equal(logits(tuned.model), logits(one))


@pytest.mark.acid("lorahub", 2)
def test_halves_of_two_have_cross_terms_and_are_no_mean_of_updates(tmp_path):
    places = sources(tmp_path, 2)
    tuned, _ = hub(places)
    held = [open_source(place) for place in places]
    for key, module in tuned.modules(SummedUpdate).items():
        (a1, b1), (a2, b2) = ((part["a"], part["b"]) for part in (s.part(key) for s in held))
        with torch.no_grad():
            module.weigh(torch.tensor([0.5, 0.5]))
        found = module.merged(torch.zeros(len(b1), a1.shape[1]), None)[0] / 2.0  # alpha / rank
        torch.testing.assert_close(found, (b1 @ a1 + b1 @ a2 + b2 @ a1 + b2 @ a2) / 4)
        assert (found - (b1 @ a1 + b2 @ a2) / 2).abs().max() > 1e-2


@pytest.mark.acid("lorahub", 3)
def test_no_gradient_is_computed(tmp_path):
    tuned, modules = hub(sources(tmp_path, 2), train=True)
    seen = []

    def batch():
        loss = tuned.model(**inputs(tuned.model)).loss
        seen.append(loss.requires_grad)
        return loss

    with (
        patch("torch.autograd.backward", side_effect=AssertionError),
        patch("torch.autograd.grad", side_effect=AssertionError),
    ):
        tuned.tuning().method.prepare(tuned, [batch])
    assert seen and not any(seen), "no graph either"
    assert all(p.grad is None for p in tuned.model.parameters())
    assert all(m.each_a is None and m.each_b is None for m in modules), "the sources are let go"


@pytest.mark.acid("lorahub", 4)
@pytest.mark.parametrize("trials", [1, 2, 7, 40])
def test_no_more_trials_than_allowed_and_within_the_bound(tmp_path, trials):
    tuned, modules = hub(sources(tmp_path, 3), trials=trials, bound=0.7)
    tried, calls, keep = [], [], modules[0].weigh
    modules[0].weigh = lambda w: tried.append(w.clone()) or keep(w)
    tuned.tuning().method.prepare(tuned, [lambda: calls.append(1) or tuned.model(**inputs(tuned.model)).loss] * 9)
    assert len(calls) <= trials * 4, "of nine steps, four"
    assert len(tried) - 1 == len(calls) / 4, "the last is the choice"
    assert float(torch.stack(tried).abs().max()) <= 0.7
    assert len({tuple(w.tolist()) for w in tried}) > min(trials, 3) - 1


@pytest.mark.acid("lorahub", 5)
@pytest.mark.parametrize("which", [0, 2])
def test_it_finds_the_module_of_the_task(tmp_path, which):
    """The new task's targets are what the model computes with one of four modules."""
    places = sources(tmp_path, 4)
    teacher = tiny("gpt2")
    load(teacher, places[which])
    tuned, modules = hub(places, trials=40)
    batches = [inputs(teacher, seed=seed) for seed in (1, 2)]
    wanted = [logits(teacher, batch) for batch in batches]
    chosen, keep = [], modules[0].weigh
    modules[0].weigh = lambda w: chosen.append(w.clone()) or keep(w)

    def apart(batch, want):
        return (tuned.model(**batch).logits - want).square().mean()

    looks = [lambda b=b, w=w: apart(b, w) for b, w in zip(batches, wanted, strict=True)]
    tuned.tuning().method.prepare(tuned, looks)
    found = chosen[-1] * chosen[-1].sum().sign()  # -w is the same update
    torch.testing.assert_close(found, torch.eye(4)[which], rtol=0, atol=0.1)


def test_the_search_descends_a_bowl_and_passes_what_is_no_number():
    aim = torch.tensor([0.75, -0.5])

    def cost(w):
        return float("nan") if w[0] > 1.1 else float((w - aim).square().sum())

    torch.manual_seed(0)
    torch.testing.assert_close(compass(cost, 2, 1.5, 200), aim, rtol=0, atol=0.05)
    assert not compass(lambda w: float(w.abs().sum()), 3, 1.5, 40).any(), "nothing is better than nothing"


def test_what_it_found_is_saved_and_loads_without_its_sources(tmp_path):
    tuned, _ = hub(sources(tmp_path, 2))
    searched(tuned)
    tuned.save(tmp_path / "hub")
    again = tiny("gpt2")
    load(again, tmp_path / "hub")
    assert torch.equal(logits(again), logits(tuned.model))


def test_the_sum_trains_on_also_from_zero(tmp_path):
    tuned, modules = hub(sources(tmp_path, 2), train=True, trials=1)  # w = 0 alone is tried
    searched(tuned)
    before = [(m.a.detach().clone(), m.b.detach().clone()) for m in modules]
    train(tuned, 3)
    assert all((m.a != a).any() and (m.b != b).any() for m, (a, b) in zip(modules, before, strict=True))


def test_unsearched_without_rows_without_sources_and_unlike_sources_are_refused(tmp_path):
    places = sources(tmp_path, 1)
    tuned, _ = hub(places, train=True)
    with pytest.raises(ConfigError, match="never searched"):
        train(tuned, 1)
    with pytest.raises(ConfigError, match="no row to search with"):
        tuned.tuning().method.prepare(tuned, [])
    with pytest.raises(ConfigError, match=r"no LoRAs to sum\. Name tunings of lora"):
        attach(tiny("gpt2"), "lorahub")
    other = saved(tmp_path / "other", 7, "lora", "gpt2", rank=2, alpha=6.0)
    with pytest.raises(ConfigError, match="must be alike"):
        hub([*places, other])
    started = attach(tiny("gpt2"), "pissa", rank=3)
    stir(started)
    started.save(tmp_path / "pissa")
    with pytest.raises(ConfigError, match="with a start of its own"):
        hub([tmp_path / "pissa"])


def test_a_run_searches_first_and_resumes_to_the_same_bits(tmp_path):
    for seed in (1, 2):
        run(little_spec(tmp_path, "lora", seed=seed, out=str(tmp_path / f"lora-{seed}")))
    places = [str(tmp_path / f"lora-{seed}") for seed in (1, 2)]
    spec = little_spec(tmp_path, "lorahub", sources=places, settings={"train": True}, steps=4)
    with patch.object(SummedUpdate, "weigh", autospec=True, side_effect=SummedUpdate.weigh) as tried:
        run(replace(spec, out=str(tmp_path / "whole")))
    assert tried.call_count > 40, "it has searched"
    run(replace(spec, out=str(tmp_path / "stopped")), stop_at=2)
    with patch.object(SummedUpdate, "weigh", side_effect=AssertionError):
        resume(tmp_path / "stopped")
    assert run_digests(tmp_path / "stopped") == run_digests(tmp_path / "whole")

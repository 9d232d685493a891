"""Masking: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from methods.checks import logits, train
from methods.sizes import stored, trained
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.methods.partial.threshold_mask import Masked
from luthier.surgery import attach, load


def masked(name="bert", **settings):
    tuned = attach(tiny(name), "threshold_mask", **settings)
    return tuned, tuned.modules(Masked)


def test_counts_are_those_of_the_catalogue():
    assert trained("bert", "threshold_mask", pooler=False) == 84_934_656
    assert trained("bert", "threshold_mask") == 85_524_480
    assert trained("bert", "threshold_mask", sites=("*@2-11",)) == 71_368_704
    assert stored("bert", "threshold_mask", pooler=False) == 84_934_656 // 8


@pytest.mark.acid("threshold_mask", 1)
@pytest.mark.parametrize("finished", [False, True])
def test_every_weight_is_itself_or_exactly_zero(finished):
    tuned, found = masked()
    train(tuned, 2)
    if finished:
        tuned.finish()
    for key, module in found.items():
        frozen = tuned.tensor(key.removeprefix("tensor/")).detach()
        weight = module(frozen).detach()
        assert bool(((weight == frozen) | (weight == 0)).all())
        assert 0 < int((weight == 0).sum()) < weight.numel()


@pytest.mark.acid("threshold_mask", 2)
def test_the_weights_themselves_are_bit_for_bit_what_they_were():
    tuned, _ = masked()
    train(tuned, 3, decay=0.1)
    for name, before in tiny("bert").named_parameters():
        assert name.startswith("classifier.") or torch.equal(tuned.tensor(name), before)


@pytest.mark.acid("threshold_mask", 3)
def test_the_gradient_of_a_score_is_the_weights_gradient_times_the_weight():
    tuned, found = masked()
    batch = inputs(tuned.model)
    tuned.model.eval()
    tuned.model(**batch).loss.backward()
    copy = tiny("bert")
    named = dict(copy.named_parameters())
    with torch.no_grad():
        for key, module in found.items():
            named[key.removeprefix("tensor/")].mul_(module.mask())
    copy.eval()(**batch).loss.backward()
    for key, module in found.items():
        name = key.removeprefix("tensor/")
        frozen = tuned.tensor(name).detach()
        torch.testing.assert_close(module.scores.grad, named[name].grad * frozen, atol=1e-6, rtol=1e-4)
        assert tuned.tensor(name).grad is None


@pytest.mark.acid("threshold_mask", 4)
def test_a_file_holds_a_bit_for_each_weight(tmp_path):
    tuned, found = masked()
    train(tuned, 2)
    tuned.finish()
    tuned.save(tmp_path / "tuning")
    size = (tmp_path / "tuning" / "tuning.safetensors").stat().st_size
    weights = sum(m.shape.numel() for m in found.values())
    head = 4 * sum(p.numel() for n, p in tuned.trained().items() if n.startswith("head/"))
    assert size - head < weights / 8 + 4096
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(tuned.model))


@pytest.mark.acid("threshold_mask", 5)
@pytest.mark.parametrize("share", [0.03, 0.1, 0.5])
def test_the_share_that_is_left_out_at_the_start_is_what_was_asked_for(share):
    _, found = masked(sparsity=share)
    n = sum(m.shape.numel() for m in found.values())
    out = sum(int((~m.mask()).sum()) for m in found.values())
    assert abs(out / n - share) < 3 * math.sqrt(share * (1 - share) / n)


def test_with_nothing_left_out_it_starts_as_the_base_and_its_scores_do_not_decay():
    base = logits(tiny("bert"))
    tuned, _ = masked(sparsity=0.0)
    assert torch.equal(logits(tuned.model), base)
    (group,) = tuned.groups()
    assert group.weight_decay == 0.0 and len(group.names) == len(tuned.modules(Masked))


def test_no_weight_left_and_half_of_a_fused_layer_are_refused():
    with pytest.raises(ConfigError, match="leaves no weight"):
        attach(tiny("bert"), "threshold_mask", sparsity=1.0)
    with pytest.raises(AnatomyError, match="in one tensor"):
        attach(tiny("gpt2"), "threshold_mask", sites=("attn.q",))
    with pytest.raises(AnatomyError, match="is no projection"):
        attach(tiny("gpt2"), "threshold_mask", sites=("ffn_out",))

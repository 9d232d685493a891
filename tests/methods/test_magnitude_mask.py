"""Masks that look at no data, by size and at random: their own tests, beside those that every method passes."""

import math

import pytest
import torch
from methods.checks import logits, train
from methods.sizes import stored, trained
from tiny import tiny

from luthier.core import ConfigError
from luthier.surgery import attach, load, method


def masks(name="bert", words="magnitude_mask", seed=0, **settings):
    tuned = attach(tiny(name), words, seed=seed, **settings)
    return tuned, {k: u.mask for k, u in tuned.tuning().unfrozen.items() if k.startswith("model/")}


def flat(found):
    return torch.cat([m.flatten() for m in found.values()])


@pytest.mark.acid("random_mask", 2)
@pytest.mark.acid("magnitude_mask", 2)
@pytest.mark.parametrize("words", ["magnitude_mask", "random_mask"])
def test_the_budget_is_exact(words):
    assert trained("bert", words) == 547_411
    assert stored("bert", words) == 2 * 547_411
    for scope in ("model", "tensor"):
        tuned, found = masks(words=words, share=0.01, scope=scope)
        sizes = [m.numel() for m in found.values()]
        wanted = math.floor(0.01 * sum(sizes)) if scope == "model" else sum(math.floor(0.01 * n) for n in sizes)
        assert int(flat(found).sum()) == wanted == tuned.tuning().method.n_params(tuned.anatomy)


@pytest.mark.acid("magnitude_mask", 3)
def test_the_largest_values_are_chosen_whatever_the_seed():
    tuned, found = masks(share=0.02)
    values = torch.cat([u.original.abs().flatten() for k, u in tuned.tuning().unfrozen.items() if k in found])
    chosen = flat(found)
    assert values[chosen].min() >= values[~chosen].max()
    assert torch.equal(chosen, flat(masks(share=0.02, seed=4)[1]))


@pytest.mark.acid("random_mask", 3)
def test_random_entries_follow_from_the_seed_and_are_spread_evenly():
    one, again, other = (flat(masks(words="random_mask", share=0.2, seed=s)[1]) for s in (0, 0, 1))
    assert torch.equal(one, again) and not torch.equal(one, other)
    n = len(one)
    assert abs(int((one & other).sum()) / n - 0.04) < 4 * math.sqrt(0.04 * 0.96 / n)
    assert (one != flat(masks(share=0.2)[1])).float().mean() > 0.2


@pytest.mark.acid("random_mask", 1)
@pytest.mark.acid("magnitude_mask", 1)
@pytest.mark.parametrize("words", ["magnitude_mask", "random_mask"])
def test_nothing_outside_the_mask_moves_under_decay_momentum_and_clipping(words, tmp_path):
    tuned, _ = masks(words=words, share=0.01)
    train(tuned, 4, decay=0.1)
    for unfrozen in tuned.tuning().unfrozen.values():
        if unfrozen.mask is not None:
            assert torch.equal(unfrozen.value[~unfrozen.mask], unfrozen.original[~unfrozen.mask])
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(tuned.model))


@pytest.mark.parametrize(("share", "says"), [(0.0, "keeps none"), (1e-7, "keeps none"), (1.0, "Use full")])
def test_a_share_of_nothing_or_everything_is_refused(share, says):
    model = tiny("bert")
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=says):
        attach(model, "magnitude_mask", share=share)
    assert list(model.state_dict()) == before


def test_a_second_tuning_of_the_same_method_keeps_the_first_ones_entries():
    made = method("random_mask", {"share": 0.1})
    tuned = attach(tiny("bert"), made)
    first = {k: u.mask.clone() for k, u in tuned.tuning().unfrozen.items() if u.mask is not None}
    tuned.add(made, name="other", seed=3)
    assert all(torch.equal(tuned.tuning("default").unfrozen[k].mask, m) for k, m in first.items())
    assert any(not torch.equal(tuned.tuning("other").unfrozen[k].mask, m) for k, m in first.items())

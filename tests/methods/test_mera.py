"""MerA: the acid tests of its paper, beside those that every method passes."""

import itertools

import numpy as np
import pytest
import torch
from methods.checks import counted
from methods.saved import saved
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.additive.mera import aligned, matching
from luthier.methods.parts.assignment import assignment
from luthier.methods.parts.behind import Behind
from luthier.surgery import attach, open_source


def adapter(seed, r=6, d=10):
    draw = torch.Generator().manual_seed(seed)
    shapes = {"down.weight": (r, d), "down.bias": (r,), "up.weight": (d, r), "up.bias": (d,)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def shuffled(one, seed=3):
    order = torch.randperm(len(one["down.bias"]), generator=torch.Generator().manual_seed(seed))
    return {
        "down.weight": one["down.weight"][order],
        "down.bias": one["down.bias"][order],
        "up.weight": one["up.weight"][:, order],
        "up.bias": one["up.bias"],
    }


def of(one, x):
    return torch.relu(x @ one["down.weight"].T + one["down.bias"]) @ one["up.weight"].T + one["up.bias"]


@pytest.mark.acid("mera", 4)
def test_its_numbers_on_bert_base_are_those_of_one_adapter():
    assert counted("mera") == 894_528


@pytest.mark.acid("mera", 1)
def test_an_adapter_with_shuffled_neurons_is_matched_to_itself_and_a_plain_mean_is_not_it():
    one = adapter(0)
    other = shuffled(one)
    merged = {n: (one[n] + t) / 2 for n, t in aligned(other, one).items()}
    plain = {n: (one[n] + other[n]) / 2 for n in one}
    assert all(torch.equal(merged[n], one[n]) for n in one)
    x = torch.randn(5, 10)
    assert (of(plain, x) - of(one, x)).abs().max() > 0.1


@pytest.mark.acid("mera", 2)
def test_the_matching_is_a_permutation():
    plan = matching(adapter(1), adapter(2))
    assert torch.equal(plan.sum(0), torch.ones(6))
    assert torch.equal(plan.sum(1), torch.ones(6))
    assert set(plan.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.acid("mera", 3)
def test_a_matched_adapter_computes_what_it_did():
    one, x = adapter(1), torch.randn(5, 10)
    torch.testing.assert_close(of(aligned(one, adapter(2)), x), of(one, x), rtol=1e-5, atol=1e-5)


def test_the_assignment_is_the_cheapest_of_all():
    draw = np.random.default_rng(0)
    for n in (1, 2, 5):
        cost = draw.random((n, n))
        costs = [sum(cost[i, j] for i, j in enumerate(order)) for order in itertools.permutations(range(n))]
        found = assignment(cost)
        assert sorted(found.tolist()) == list(range(n))
        assert abs(cost[np.arange(n), found].sum() - min(costs)) < 1e-12


@pytest.mark.parametrize("by", ["mean", "sum"])
def test_what_is_attached_is_the_matched_mean_or_sum(tmp_path, by):
    places = [saved(tmp_path, seed) for seed in (0, 1)]
    tuned = attach(tiny("bert"), "mera", sources=places, by=by)
    one, two = (open_source(place).part("ffn_out@1") for place in places)
    two = aligned(two, one)
    factor = 2 if by == "mean" else 1
    for name, value in tuned.modules(Behind)["ffn_out@1"].state_dict().items():
        torch.testing.assert_close(value, (one[name] + two[name]) / factor)


def test_one_source_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="mera: is made of saved tunings of pfeiffer_adapter, at least 2; 1 given"):
        attach(tiny("bert"), "mera", sources=[saved(tmp_path)])
    with pytest.raises(ConfigError, match="mera: no adapters to make one of"):
        attach(tiny("bert"), "mera")

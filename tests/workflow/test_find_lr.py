"""The range test: rates rise, the loss falls and bursts, and everything is put back."""

import dataclasses

import pytest
import torch
from in_memory import Runs
from little import little_spec

from luthier.core import ConfigError
from luthier.runs.spec import OptimSpec
from luthier.workflow.find_lr import _read, find_lr, range_test

torch.set_num_threads(1)


@pytest.mark.acid("clr", 4)
def test_weights_and_optimiser_are_put_back_bit_for_bit(tmp_path):
    loop = Runs(tmp_path).loop("ema+self_ensemble", "full")
    before = {n: p.detach().clone() for n, p in loop.tuned.trained().items()}
    moments = {n: t.clone() for n, t in loop.optimiser.tensors().items()}
    found = range_test(loop, 1e-5, 1e-1, 12)
    assert found.rates[0] == pytest.approx(1e-5) and len(found.rates) == len(found.losses) == len(found.smoothed) > 4
    assert all(torch.equal(p, before[n]) for n, p in loop.tuned.trained().items())
    assert all(torch.equal(t, moments[n]) for n, t in loop.optimiser.tensors().items())
    assert not any(p.grad is not None for p in loop.tuned.trained().values())


def test_rates_rise_by_one_factor_and_a_test_twice_finds_the_same(tmp_path):
    spec = little_spec(tmp_path, steps=3)
    one, other = (find_lr(spec, low=1e-4, high=1.0, steps=9) for _ in range(2))
    assert one == other
    factors = {round(b / a, 6) for a, b in zip(one.rates, one.rates[1:], strict=False)}
    assert len(factors) == 1 and not (tmp_path / "run").exists(), "nothing is written"


def test_the_steepest_fall_and_the_lowest_point_are_read_from_the_running_means():
    rates, means = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [1.0, 1.01, 0.95, 0.6, 0.5, 0.9]
    found = _read(rates, means, means)
    scattered = [m + (0.8 if i % 2 else -0.8) for i, m in enumerate(means)]
    assert _read(rates, scattered, means).steepest is None, "no more than single losses scatter"
    assert (found.steepest, found.lowest, found.begins) == (8.0, 16.0, 4.0)
    assert _read(rates, means, sorted(means)).steepest is None, "where it never falls"
    assert _read([], [], []).lowest is None


def test_bounds_that_are_none_are_refused(tmp_path):
    spec = little_spec(tmp_path)
    for bounds in ({"low": 0.1, "high": 0.01}, {"low": 0.0}, {"steps": 2}):
        with pytest.raises(ConfigError, match="0 < low < high"):
            find_lr(spec, **bounds)
    with pytest.raises(ConfigError, match="Test with sgd"):
        find_lr(dataclasses.replace(spec, optim=OptimSpec(name="lomo", lr=0.1)))

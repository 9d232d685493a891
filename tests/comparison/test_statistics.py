"""Intervals, exact tests and ties, against counts by hand and against races whose truth is planted."""

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from luthier.comparison import statistics
from luthier.comparison.scores import SCORES, score_named
from luthier.comparison.statistics import flips, mcnemar, resample, sign_flip, smallest_visible
from luthier.core import ConfigError
from luthier.training.metrics import METRICS


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 300)


def planted(rows: int, rights: list[float], seeds: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Wanted classes, and answers of methods that are right with these chances; hard rows are hard for all."""
    draw = np.random.default_rng(seed)
    wanted = draw.integers(0, 3, rows)
    hard = draw.random(rows)
    answered = np.empty((len(rights), seeds, rows), dtype=np.int64)
    for method, chance in enumerate(rights):
        for s in range(seeds):
            right = 0.7 * hard + 0.3 * draw.random(rows) < np.quantile(0.7 * hard + 0.3 * draw.random(rows), chance)
            answered[method, s] = np.where(right, wanted, (wanted + 1) % 3)
    return wanted, answered


def test_scores_of_equal_weights_are_those_of_a_run() -> None:
    draw = np.random.default_rng(0)
    wanted, said = draw.integers(0, 4, 60), draw.integers(0, 5, 60)
    for name, score in SCORES.items():
        function = METRICS[name].function
        assert function is not None
        assert score(wanted, said, np.ones(60)) == pytest.approx(function(said.tolist(), wanted.tolist())), name
    with pytest.raises(ConfigError, match="Did you mean 'macro_f1'"):
        score_named("macro-f1")


def test_a_weight_of_two_is_a_row_that_stands_twice() -> None:
    draw = np.random.default_rng(1)
    wanted, said = draw.integers(0, 3, 20), draw.integers(0, 3, 20)
    times = draw.integers(0, 3, 20)
    for name, score in SCORES.items():
        again = score(np.repeat(wanted, times), np.repeat(said, times), np.ones(times.sum()))
        assert score(wanted, said, times.astype(float)) == pytest.approx(again), name


def test_mcnemar_counts_coin_tosses() -> None:
    for n in range(1, 9):
        for k in range(n + 1):
            tosses = itertools.product((0, 1), repeat=n)
            far = sum(abs(sum(t) - n / 2) >= abs(k - n / 2) for t in tosses) / 2**n
            assert mcnemar(k, n - k) == pytest.approx(far)
    assert mcnemar(0, 0) == 1.0


def test_flips_are_rows_that_only_one_answers_rightly() -> None:
    wanted, a, b = np.array([0, 1, 2, 2]), np.array([0, 1, 0, 0]), np.array([0, 0, 2, 1])
    assert flips(a == wanted, b == wanted) == (1, 1)


def test_five_seeds_never_reach_one_in_twenty_and_six_do() -> None:
    assert sign_flip(np.full(5, 0.1)) == 1 / 16
    assert sign_flip(np.full(6, 0.1)) == 1 / 32
    assert sign_flip(np.zeros(6)) == 1.0
    assert statistics.LEAST_SEEDS == 6


def test_an_interval_of_one_method_is_that_of_a_share() -> None:
    draw = np.random.default_rng(3)
    wanted = np.zeros(400, dtype=np.int64)
    answered = (draw.random((1, 1, 400)) > 0.8).astype(np.int64)
    low, high = resample(SCORES["accuracy"], wanted, answered, np.arange(400)).interval(0)
    share = float((answered == 0).mean())
    half = 1.96 * math.sqrt(share * (1 - share) / 400)
    assert low == pytest.approx(share - half, abs=0.015) and high == pytest.approx(share + half, abs=0.015)


def test_near_copies_of_a_row_widen_the_interval() -> None:
    wanted, answered = planted(60, [0.8, 0.7], 1, 4)
    apart = resample(SCORES["accuracy"], np.repeat(wanted, 5), np.repeat(answered, 5, 2), np.arange(300))
    together = resample(
        SCORES["accuracy"], np.repeat(wanted, 5), np.repeat(answered, 5, 2), np.repeat(np.arange(60), 5)
    )
    a, b = apart.difference(0, 1), together.difference(0, 1)
    assert a.value == b.value
    assert b.high - b.low > 1.5 * (a.high - a.low)


def test_one_method_against_itself_has_no_difference_and_a_clear_gain_has_one() -> None:
    wanted, answered = planted(500, [0.85, 0.7], 2, 5)
    same = resample(SCORES["accuracy"], wanted, answered[[0, 0]], np.arange(500)).difference(0, 1)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    gain = resample(SCORES["accuracy"], wanted, answered, np.arange(500)).difference(0, 1)
    assert gain.low > 0 and gain.p < 0.05


@pytest.mark.parametrize("rows", [1, 40])
def test_rows_that_are_all_copies_of_one_are_drawn_alone(rows: int) -> None:
    wanted, answered = planted(rows, [0.85, 0.7], 1, 5)
    copies, alone = (resample(SCORES["accuracy"], wanted, answered, c) for c in (np.zeros(rows, int), np.arange(rows)))
    assert copies.interval(0) == alone.interval(0) and np.isfinite(copies.left_out).all()


def test_the_best_of_many_equals_is_praised_for_luck() -> None:
    wanted, answered = planted(200, [0.7] * 8, 1, 6)
    many = resample(SCORES["accuracy"], wanted, answered, np.arange(200)).optimism()
    one = resample(SCORES["accuracy"], wanted, answered[:1], np.arange(200)).optimism()
    assert many > 0.005 > one


def test_what_can_be_seen_shrinks_with_the_root_of_the_rows() -> None:
    assert smallest_visible(400) == pytest.approx(2 * smallest_visible(1600))
    assert smallest_visible(4) <= 1

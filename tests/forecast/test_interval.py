"""Intervals from finished runs."""

import math
import random

import pytest

from luthier.forecast import Pair, interval, residuals


def pair(ratio: float, device: str = "cpu", family: str = "partial") -> Pair:
    return Pair(
        model="m", method="x", family=family, device=device, rows=1, tokens=1, forecast=10**9,
        measured=round(10**9 * ratio),
    )  # fmt: skip


def test_without_runs_the_ends_are_assumed_and_wide() -> None:
    found = interval(100, "cpu", "partial", [pair(1.1)] * 18, certain=60, growing=40)
    assert (found.low, found.likely, found.high, found.n) == (60, 100, 168, 0)


def test_runs_on_another_kind_of_device_say_nothing() -> None:
    assert interval(100, "cuda", "partial", [pair(1.1)] * 50, 60, 40).n == 0


def test_nineteen_runs_give_their_smallest_and_largest_ratio() -> None:
    pairs = [pair(1 + i / 100) for i in range(19)]
    found = interval(10**6, "cpu", "partial", pairs, 0, 0)
    assert (found.low, found.likely, found.high, found.n) == (1_000_000, 1_090_000, 1_180_000, 19)


def test_a_family_with_enough_runs_of_its_own_has_its_own_interval() -> None:
    pairs = [pair(1.0, family="additive")] * 30 + [pair(2.0)] * 30
    assert interval(100, "cpu", "additive", pairs, 0, 0).high == 100
    assert interval(100, "cpu", "unified", pairs, 0, 0).high == 200


def test_what_is_held_for_certain_is_never_below_the_interval() -> None:
    assert interval(100, "cpu", "partial", [pair(0.5)] * 30, certain=80, growing=0).low == 80


def test_nine_in_ten_of_new_runs_fall_inside() -> None:
    draw = random.Random(0)
    inside = 0
    for _ in range(400):
        pairs = [pair(math.exp(draw.gauss(0.1, 0.2))) for _ in range(60)]
        new = pair(math.exp(draw.gauss(0.1, 0.2)))
        found = interval(new.forecast, "cpu", "partial", pairs, 0, 0)
        inside += found.low <= new.measured <= found.high
    assert 0.86 < inside / 400 < 0.95


def test_a_planted_error_is_found() -> None:
    good = [pair(1 + (i % 5) / 100) for i in range(40)]
    off = residuals([*good, *[pair(3.0)] * 2])
    assert off is not None and off.above == pytest.approx(2 / 42, abs=0.03)
    assert off.median_error < 0.03
    assert residuals(good[:19]) is None

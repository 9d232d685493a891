"""Intervals from finished runs."""

import math
import random

import pytest

from luthier.forecast import Interval, Pair, constant_of, interval, residuals


def pair(
    ratio: float, device: str = "cpu", family: str = "partial", *, method: str = "x", size: int = 10**9, more: int = 0
) -> Pair:
    return Pair(
        model="m", method=method, family=family, device=device, rows=1, tokens=1, forecast=size,
        measured=round((size + more) * ratio),
    )  # fmt: skip


def test_without_runs_the_ends_are_assumed_and_wide() -> None:
    found = interval(100, "cpu", "partial", [pair(1.1)] * 18, certain=60, growing=40)
    assert (found.low, found.likely, found.high, found.n) == (60, 100, 168, 0)


def test_runs_on_another_kind_of_device_say_nothing() -> None:
    assert interval(100, "cuda", "partial", [pair(1.1)] * 50, 60, 40).n == 0


def test_what_every_run_takes_is_no_ratio() -> None:
    sizes = [10**8 * (1 + i) for i in range(20)]
    known = [pair(1 + (i % 3 - 1) / 100, size=size, more=150_000_000) for i, size in enumerate(sizes)]
    assert constant_of(known) == pytest.approx(150_000_000, rel=0.1)
    found = interval(10**8, "cpu", "partial", known, 0, 0)
    assert found.n == 20 and found.likely == pytest.approx(250_000_000, rel=0.03)
    assert found.low == pytest.approx(0.99 * 250_000_000, rel=0.03)
    assert found.high == pytest.approx(1.01 * 250_000_000, rel=0.03)
    large = interval(2 * 10**9, "cpu", "partial", known, 0, 0)  # as a ratio of the small ones it would be 5 GB
    assert large.high == pytest.approx(1.01 * 2_150_000_000, rel=0.03)


def test_a_device_that_takes_less_than_was_counted_has_no_constant() -> None:
    assert constant_of([pair(0.9, size=10**8 * (1 + i)) for i in range(20)]) == 0


def test_nineteen_runs_give_their_smallest_and_largest_ratio() -> None:
    pairs = [pair(0.8 + i / 100) for i in range(19)]  # most are below 1: no constant
    found = interval(10**6, "cpu", "partial", pairs, 0, 0)
    assert (found.low, found.likely, found.high, found.n) == (800_000, 890_000, 980_000, 19)


def test_a_run_far_larger_than_all_that_are_known_has_assumed_ends() -> None:
    known = [pair(1.0)] * 30
    assert interval(14 * 10**8, "cpu", "partial", known, 0, 0).n == 30
    assert interval(16 * 10**8, "cpu", "partial", known, 10, 10**8) == Interval(10, 16 * 10**8, 204 * 10**7, 0)


def test_a_family_with_enough_runs_of_its_own_has_its_own_interval() -> None:
    pairs = [pair(1.0, family="additive")] * 31 + [pair(2.0)] * 30
    assert interval(100, "cpu", "additive", pairs, 0, 0).high == 100
    assert interval(100, "cpu", "unified", pairs, 0, 0).high == 200


def test_what_is_held_for_certain_is_never_below_the_interval() -> None:
    assert interval(100, "cpu", "partial", [pair(0.5)] * 30, certain=80, growing=0).low == 80


def test_nine_in_ten_of_new_runs_fall_inside() -> None:
    draw = random.Random(0)

    def one() -> Pair:
        return pair(math.exp(draw.gauss(0, 0.2)), size=round(10**9 * math.exp(draw.gauss(0, 0.7))), more=200_000_000)

    inside = n = 0
    for _ in range(400):
        pairs, new = [one() for _ in range(60)], one()
        found = interval(new.forecast, "cpu", "partial", pairs, 0, 0)
        if found.n:
            n += 1
            inside += found.low <= new.measured <= found.high
    assert n > 350 and 0.86 < inside / n < 0.95


def test_a_method_is_judged_by_the_runs_of_others() -> None:
    good = [pair(1 + (i % 5 - 4) / 100, method="a") for i in range(40)]
    off = residuals([*good, *[pair(3.0, method="b")] * 2])
    assert off is not None and off.n == 2 and off.above == 1  # those of a have too few others
    known = [pair(1 + (i % 5 - 4) / 100, method="c") for i in range(40)]
    both = residuals([*good, *[pair(3.0, method="b")] * 2], known)
    assert both is not None and both.n == 42 and both.above == pytest.approx(2 / 42)
    assert both.median_error < 0.03
    assert residuals(good) is None

"""The verdict on races whose truth is planted; `python -m benchmarks.planted_truth` runs many more of them."""

import numpy as np
import pytest

from benchmarks import planted_truth as planted
from luthier.comparison import statistics


@pytest.fixture(autouse=True)
def _fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 300)


@pytest.mark.parametrize(
    "race", [planted.two_names, planted.one_seed, planted.copies, planted.last_of_four, planted.gain(6)],
    ids=["two-names", "one-seed", "copies", "last-of-four", "gain"],
)  # fmt: skip
def test_what_was_planted_is_found(race: planted.Race) -> None:
    assert sum(race(np.random.default_rng(number)) for number in range(5)) >= 4


@pytest.mark.parametrize(("methods", "seeds"), [(2, 3), (10, 3), (10, 6)])
def test_equal_methods_are_not_called_worse(methods: int, seeds: int) -> None:
    race = planted.equal(methods, seeds)
    assert sum(race(np.random.default_rng(number)) for number in range(20)) >= 18


def test_of_ten_equals_the_last_is_told_from_the_best_less_easily_than_of_two() -> None:
    wanted, made = planted.answers(np.random.default_rng(3), [0.85] * 10, rows=1000, seeds=3)
    best, last = (
        int(f) for f in ((made == wanted).mean(axis=(1, 2)).argmax(), (made == wanted).mean(axis=(1, 2)).argmin())
    )
    of_ten = planted.told(planted.judged(wanted, made), f"m{last}").p
    of_two = planted.judged(wanted, made[[best, last]]).standings[1].p
    assert of_ten > 2 * of_two


def test_with_six_seeds_one_of_many_can_be_called_worse() -> None:
    wanted, made = planted.answers(np.random.default_rng(4), [0.85] * 5 + [0.7], rows=500, seeds=6)
    found = planted.judged(wanted, made)
    assert [s.name for s in found.standings if s.word == "worse"] == ["m5"]
    assert "m5 is worse than it." in found.findings

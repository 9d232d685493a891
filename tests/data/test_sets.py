"""Rows of several sets in one table."""

import numpy as np
import pytest

from luthier.data.sets import Sets

SETS = Sets(names=("train", "old", "other"), starts=(0, 4, 4, 7))


def test_the_first_set_is_learnt_and_all_others_are_further_ones() -> None:
    assert SETS.further == ("old", "other")
    assert Sets(names=("train",), starts=(0, 3)).further == ()


@pytest.mark.parametrize(("name", "rows"), [("train", [0, 1, 2, 3]), ("old", []), ("other", [4, 5, 6])])
def test_the_examples_of_a_set_follow_one_another(name: str, rows: list[int]) -> None:
    assert SETS.rows(name).tolist() == rows


def test_each_example_knows_its_set_and_empty_sets_have_none() -> None:
    assert SETS.numbers(np.arange(7)).tolist() == [0, 0, 0, 0, 2, 2, 2]

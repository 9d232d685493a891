"""The answer at the end of a text, and answers that are the same though they are written otherwise."""

import pytest

from luthier.asking.finals import final_answer, normalised_answer

TABLE = [
    ("She has 3 + 4 = 7 apples. The answer is 7 apples.", "7"),
    ("So he pays 1,200 dollars.\n#### 1,200", "1200"),
    ("The answer is $1,200.50.", "2401/2"),
    (r"Thus the result is \boxed{\frac{1}{2}}.", "1/2"),
    (r"Hence $x = 0.5$ and the final answer is $0.5$.", "1/2"),
    ("Answer: (B)", "b"),
    ("**Answer:** The Moon.", "the moon"),
    ("First 12, then 15, and 27 in all", "27"),
    ("The answer is -3.", "-3"),
    ("It is 50% of them. The answer is 50%.", "50"),
    (r"The answer is \text{blue}.", "blue"),
    ("The answer is 5. No: the answer is 6.", "6"),
    ("The answer is 3 1/2 ...", "3 1/2"),
]


@pytest.mark.acid("cot", 1)
@pytest.mark.parametrize(("text", "wanted"), TABLE)
def test_answers_are_found_in_many_forms(text: str, wanted: str) -> None:
    found = final_answer(text)
    assert found is not None and normalised_answer(found) == wanted


@pytest.mark.parametrize("text", ["", "I do not know.", "..."])
def test_a_text_without_an_answer_has_none(text: str) -> None:
    assert final_answer(text) is None


def test_labels_are_found_by_their_words() -> None:
    words = {"LOC": "place", "NUM": "number", "N": "no"}
    assert final_answer("A number? Not a number, it is a place.", words) == "LOC"
    assert final_answer("A place is meant. The answer is number, not place.", words) == "NUM"
    assert final_answer("nothing known", words) is None


@pytest.mark.parametrize(
    ("one", "other"), [("1,000", "1000.0"), ("12 apples", "12"), ("Paris.", "paris"), ("(c)", "C"), ("2/4", "0.5")]
)
def test_the_same_answer_may_be_written_otherwise(one: str, other: str) -> None:
    assert normalised_answer(one) == normalised_answer(other)


@pytest.mark.parametrize(("one", "other"), [("12", "13"), ("3 doors down the street", "3"), ("1/0", "1")])
def test_other_answers_are_others(one: str, other: str) -> None:
    assert normalised_answer(one) != normalised_answer(other)

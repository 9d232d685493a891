import random
from collections import Counter
from typing import Any

import pytest

from luthier.core import DataError
from luthier.samples.parsers import Parsed
from luthier.samples.split import same, standard_split

Rows = list[dict[str, Any]]


def labelled(n: int, label: str) -> Rows:
    return [{"text": f"{label} {i}", "label": label} for i in range(n)]


def texts(rows: Rows) -> set[str]:
    return {row["text"] for row in rows}


def test_sameness_ignores_case_and_white_space_only() -> None:
    assert same(" A\t b\n") == same("a B")
    assert same("a-b") != same("a b")


def test_copies_go_before_the_split() -> None:
    rows = labelled(50, "x") + labelled(50, "y")
    copies = [{"text": row["text"].upper() + " ", "label": row["label"]} for row in rows]
    halves = standard_split("t", Parsed(rows=rows + copies))
    assert halves.counts["shipped"] == 200
    assert halves.counts["unique"] == 100
    assert halves.counts["dropped_within"] == 100
    assert not {same(t) for t in texts(halves.train)} & {same(t) for t in texts(halves.test)}
    assert len(halves.train) + len(halves.test) == 100


def test_each_class_gives_a_fifth() -> None:
    halves = standard_split("t", Parsed(rows=labelled(100, "x") + labelled(35, "y") + labelled(5, "z")))
    assert Counter(row["label"] for row in halves.test) == {"x": 20, "y": 7, "z": 1}
    assert Counter(row["label"] for row in halves.train) == {"x": 80, "y": 28, "z": 4}


def test_the_order_of_the_file_does_not_change_the_split_and_the_name_does() -> None:
    rows = labelled(60, "x") + labelled(40, "y")
    shuffled = rows[:]
    random.Random(1).shuffle(shuffled)
    first = texts(standard_split("t", Parsed(rows=rows)).test)
    assert texts(standard_split("t", Parsed(rows=shuffled)).test) == first
    assert texts(standard_split("u", Parsed(rows=rows)).test) != first


def test_a_text_with_two_labels_goes_and_is_named() -> None:
    rows = [*labelled(20, "x"), {"text": "both", "label": "x"}, {"text": "BOTH", "label": "y"}, *labelled(20, "y")]
    halves = standard_split("t", Parsed(rows=rows))
    assert halves.conflicts == ["x / y: both"]
    assert (halves.counts["conflicts"], halves.counts["dropped_conflicts"]) == (1, 2)
    assert "both" not in texts(halves.train) | texts(halves.test)


def test_an_own_split_is_kept_and_training_loses_what_the_test_half_holds() -> None:
    train, test = labelled(10, "x") + labelled(3, "y"), labelled(2, "x") + labelled(9, "y")
    halves = standard_split("t", Parsed(rows=train, test=test))
    assert halves.test == test
    assert halves.counts["dropped_across"] == 5
    assert texts(halves.train) == {f"x {i}" for i in range(2, 10)}


def test_a_pair_is_told_apart_by_both_texts() -> None:
    rows = [{"text": "q", "text_pair": f"p{i}", "label": "x"} for i in range(10)]
    assert standard_split("t", Parsed(rows=rows)).counts["unique"] == 10


def test_rows_of_one_source_stay_in_one_half() -> None:
    rows = [
        {"text": f"question {q}", "text_pair": f"clause {c}", "label": "xy"[(q + c) % 2]}
        for q in range(30)
        for c in range(1 + q % 7)
    ]
    halves = standard_split("t", Parsed(rows=rows, source=lambda row: str(row["text"])))
    assert not texts(halves.train) & texts(halves.test)
    assert 0.1 < len(halves.test) / len(rows) < 0.35


def test_rows_without_a_label_are_told_apart_as_a_whole() -> None:
    rows = [{"prompt": "p", "response": str(n)} for n in range(5)] + [{"prompt": "Q", "response": "r"}] * 2
    halves = standard_split("t", Parsed(rows=rows, source=lambda row: str(row["prompt"])))
    assert halves.counts["unique"] == 6
    assert {len({row["prompt"] for row in half}) for half in (halves.train, halves.test)} == {1}


def test_every_shipped_row_is_accounted_for() -> None:
    rows = labelled(40, "x") * 2 + [{"text": "both", "label": "x"}, {"text": "both", "label": "y"}]
    counts = standard_split("t", Parsed(rows=rows, test=labelled(3, "x"), left_out=Counter(neutral=4))).counts
    gone = ("left_out", "dropped_within", "dropped_across", "dropped_conflicts")
    assert counts["shipped"] == counts["train"] + counts["test"] + sum(counts[name] for name in gone)


def test_an_empty_half_is_refused() -> None:
    with pytest.raises(DataError, match="1 rows to train on and 0 to test on"):
        standard_split("t", Parsed(rows=labelled(1, "x")))

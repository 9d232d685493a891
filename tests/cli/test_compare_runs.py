"""The demo says which methods differ and which do not, and crowns no tie."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from word_tables import WORDS

from luthier.cli import demo
from luthier.cli._compare_runs import compare
from luthier.comparison import mcnemar

ROOT = Path(__file__).resolve().parents[2]


def _run(home: Path, method: str, right: list[bool], trained: int, rare_f1: float) -> dict[str, Any]:
    (home / method).mkdir()
    with (home / method / "predictions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["place", "text", "wanted", "answer"])
        writer.writerows(
            [f"r:{i}", f"{WORDS[i % 20]} {WORDS[i // 20]}", "a", "a" if ok else "b"] for i, ok in enumerate(right)
        )
    classes = [
        {"name": "a", "rows": 90, "learnt": 400, "f1": 0.9}, {"name": "c", "rows": 9, "learnt": 40, "f1": rare_f1},
        {"name": "d", "rows": 0, "learnt": 3, "f1": 0.0},
    ]  # fmt: skip
    return {
        "method": method, "path": str(home / method), "trained": trained,
        "scores": {"accuracy": sum(right) / len(right)}, "quality": {"classes": classes},
    }  # fmt: skip


def test_a_tie_is_called_one_and_what_is_worse_is_named(tmp_path: Path) -> None:
    lora = [i >= 8 for i in range(100)]
    runs = [
        _run(tmp_path, "head_only", [i >= 40 for i in range(100)], 2, 0.1),
        _run(tmp_path, "ia3", [not 3 <= i < 12 for i in range(100)], 16, 0.7),
        _run(tmp_path, "lora", lora, 76, 0.4),
    ]
    found = compare(runs)
    assert (found.best, found.worse, found.kept) == (("ia3", "lora"), ("head_only",), "ia3")
    assert found.sentences() == [
        "These 100 held-out rows do not tell ia3 and lora apart. head_only is worse.",
        "On the rarest class, 'c' (9 rows), best: ia3 (F1 0.70).",
        "Of those that are not told apart, ia3 trains the fewest numbers.",
    ]
    alone = compare([runs[0], runs[2]])
    assert alone.sentences()[0] == "On these 100 held-out rows lora is better than the others."


def test_the_last_of_many_equals_is_not_called_worse_for_being_last(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    answers = (draw.random((30, 300)) < 0.8).tolist()
    answers.sort(key=sum)
    apart = compare([_run(tmp_path, f"m{i}", answers[i], i, 0.5) for i in (0, 29)])
    assert apart.worse == ("m0",), "as two alone they differ"
    (tmp_path / "all").mkdir()
    assert compare([_run(tmp_path / "all", f"m{i}", own, i, 0.5) for i, own in enumerate(answers)]).worse == ()


def test_few_rows_that_differ_are_too_few(tmp_path: Path) -> None:
    runs = [_run(tmp_path, "a", [i >= 5 for i in range(100)], 1, 0.5), _run(tmp_path, "b", [True] * 100, 2, 0.5)]
    assert compare(runs).worse == ()


@pytest.mark.parametrize(("one", "other"), [(0, 0), (5, 5), (12, 2), (30, 11), (1, 0)])
def test_the_chance_is_that_of_the_binomial_test(one: int, other: int) -> None:
    wanted = stats.binomtest(one, one + other, 0.5).pvalue if one + other else 1.0
    assert mcnemar(one, other) == pytest.approx(wanted)


def test_the_page_about_choosing_names_the_passes_that_the_demo_makes() -> None:
    words = {1.0: "one epoch", 2.0: "two epochs", 3.0: "three epochs"}[demo.EPOCHS]
    assert words in (ROOT / "docs" / "choose.md").read_text()

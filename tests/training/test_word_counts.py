"""The baseline of counted words."""

import numpy as np
import pytest

from luthier.data.tasks import Task
from luthier.training import word_counts
from luthier.training.quality import judge
from luthier.training.word_counts import FEWEST_ROWS, answers_by_words

TEXTS = [f"{word} {i % 7}" for i, word in enumerate(["red", "dog", "a"] * 50)]
TARGETS = np.arange(150, dtype=np.int64) % 3


def test_words_that_tell_the_class_are_learnt() -> None:
    said = answers_by_words(TEXTS, TARGETS, ["the dog", "a", "red"])
    assert said is not None and said.tolist() == [1, 2, 0]


def test_what_would_say_nothing_or_take_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answers_by_words(TEXTS[: FEWEST_ROWS - 1], TARGETS[: FEWEST_ROWS - 1], ["dog"]) is None
    assert answers_by_words(["..."] * 150, TARGETS, ["dog"]) is None
    assert answers_by_words(TEXTS, np.zeros(150, dtype=np.int64), ["dog"]) is None
    with monkeypatch.context() as patched:
        patched.setattr("importlib.util.find_spec", lambda name: None)
        assert answers_by_words(TEXTS, TARGETS, ["dog"]) is None
    monkeypatch.setattr(word_counts, "MOST_WORK", 100)
    assert answers_by_words(TEXTS, TARGETS, ["dog"]) is None


def test_a_run_that_words_beat_says_so_and_one_that_beats_them_does_not() -> None:
    task = Task(name="classification", labels=("a", "b"))
    wanted = np.arange(200, dtype=np.int64) % 2

    def said(right: int) -> np.ndarray:
        return np.where(np.arange(200) < right, wanted, 1 - wanted)

    def warnings(ours: int, words: int) -> str:
        quality = judge(task, np.eye(2)[said(ours)] * 9, wanted, wanted, 0.1, said(words))
        assert quality is not None and quality.by_words == words / 200
        return " ".join(quality.warnings)

    assert "right in 90.0% of these rows, this run in 80.0%. " in warnings(160, 180)
    assert "within the noise" in warnings(178, 180)
    assert "TF-IDF" not in warnings(180, 178)

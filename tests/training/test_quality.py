"""What a run is worth, by hand-made answers: intervals, baselines, classes, calibration, and what is no result."""

import numpy as np
import pytest

from luthier.data.tasks import Task
from luthier.training.quality import NO_RESULT, judge

ABC = Task(name="classification", labels=("a", "b", "c"))


def logits_of(answers, certainty=3.0, n=3):
    found = np.zeros((len(answers), n))
    found[np.arange(len(answers)), answers] = certainty
    return found


def quality(answers, wanted, learnt=(0, 0, 1, 2), loss=0.5, certainty=3.0, task=ABC):
    made = judge(task, logits_of(answers, certainty, len(task.labels)), np.array(wanted), np.array(learnt), loss)
    assert made is not None
    return made


def test_scores_stand_beside_guessing_and_class_by_class():
    found = quality([0, 0, 1, 2, 2, 0], [0, 0, 1, 2, 1, 2])
    assert found.score == pytest.approx(4 / 6) and found.low < 4 / 6 < found.high
    assert (found.baseline, found.baseline_answer) == (pytest.approx(2 / 6), "a")
    b = found.classes[1]
    assert (b.name, b.recall, b.precision, b.rows, b.answered, b.learnt) == ("b", 0.5, 1.0, 2, 1, 1)
    assert found.confusion == ((2, 0, 0), (0, 1, 1), (1, 0, 1))
    assert b.f1 == pytest.approx(2 * 1 / 3)


def test_the_interval_is_wilsons():
    found = quality([0] * 45 + [1] * 5, [0] * 50, learnt=[0, 1])
    assert (round(found.low, 3), round(found.high, 3)) == (0.786, 0.957)


def test_brier_and_nll_are_those_of_the_probabilities() -> None:
    high, low = np.exp(3) / (np.exp(3) + 2), 1 / (np.exp(3) + 2)
    found = quality([0, 1, 2, 0], [0, 1, 2, 1])
    right, wrong = (1 - high) ** 2 + 2 * low**2, high**2 + (1 - low) ** 2 + low**2
    assert found.brier == pytest.approx((3 * right + wrong) / 4)
    assert found.nll == pytest.approx(-(3 * np.log(high) + np.log(low)) / 4)


def test_calibration_is_the_gap_between_certainty_and_accuracy():
    # Certainty e^3 / (e^3 + 2) = .909 in every row; 3 of 4 are right.
    found = quality([0, 1, 2, 0], [0, 1, 2, 1])
    assert found.calibration_error == pytest.approx(np.exp(3) / (np.exp(3) + 2) - 0.75)
    assert found.sure_but_wrong == (3,)
    assert quality([0, 1, 2, 0], [0, 1, 2, 1], certainty=1.0).sure_but_wrong == ()


def test_one_answer_for_all_is_no_result():
    found = quality([1] * 6, [0, 1, 2, 0, 1, 2])
    assert not found.is_result and found.warnings[0].startswith(f"{NO_RESULT}every row is answered 'b'")
    assert "--epochs" in found.warnings[0]


def test_what_is_no_better_than_guessing_is_no_result():
    found = quality([0, 1, 1, 2], [0, 0, 0, 0], learnt=[0, 0, 1])
    assert not found.is_result and "always answering 'a' would be right in 100.0%" in found.warnings[0]


def test_a_score_whose_interval_holds_the_baseline_is_doubtful():
    found = quality([0, 0, 0, 1], [0, 0, 0, 1])
    assert found.is_result and found.warnings[0].startswith("Doubtful: always answering 'a'")
    sound = quality([0, 1, 2] * 30, [0, 1, 2] * 30)
    assert sound.warnings == ()


def test_a_loss_above_that_of_guessing_is_said():
    found = quality([0, 1, 2] * 30, [0, 1, 2] * 30, loss=1.2)
    assert found.is_result and "above that of guessing, 1.10" in found.warnings[0]
    assert quality([0, 1, 2] * 30, [0, 1, 2] * 30, loss=1.1).warnings == ()


def test_a_class_that_is_learnt_badly_is_named_with_its_rows():
    found = quality(
        [0] * 30 + [1] * 30 + [0, 0, 2], [0] * 30 + [1] * 30 + [2] * 3, learnt=[0] * 20 + [1] * 20 + [2] * 2
    )
    assert "Learnt badly: 'c' (33% of 3 rows found, 2 rows to learn from)" in found.warnings[-1]


def test_measures_are_judged_in_their_unit():
    task = Task(name="regression", center=200_000.0, scale=1000.0)
    targets = np.linspace(-2, 2, 30).astype(np.float32)
    good = judge(task, targets[:, None] + 0.01, targets, targets, 0.01)
    assert good.is_result and good.score > 0.99 and good.low > 0.9
    flat = judge(task, np.full((30, 1), 0.3), targets, targets, 1.0)
    assert not flat.is_result and "every row is answered 2.003e+05" in flat.warnings[0]
    wild = judge(task, -3 * targets[:, None], targets, targets, 9.0)
    assert not wild.is_result and "the mean of the training rows" in wild.warnings[0]


def test_tags_and_texts_are_judged_elsewhere():
    assert judge(Task(name="causal_lm"), np.zeros((1, 1)), np.zeros(1), np.zeros(1), 0.0) is None

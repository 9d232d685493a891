"""Thresholds: chosen where F1 is best, kept with the task, and what every reader of answers goes by."""

import numpy as np
import pytest

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.runs.spec import EvalSpec
from luthier.training.quality import judge
from luthier.training.thresholds import FEWEST, check_thresholds, choose_thresholds

SEVERAL = Task(name="classification", labels=("a", "b"), multi_label=True)
TWO = Task(name="classification", labels=("no", "yes"))


def logit(p):
    p = np.asarray(p, dtype=float)
    return np.log(p / (1 - p))


def test_each_of_several_labels_has_the_threshold_with_the_best_f1():
    # Of a, rows are right from .3 on; of b, from .8 on.
    a = np.array([0.1] * 6 + [0.2] * 4 + [0.4] * 6 + [0.6] * 4)
    b = np.array([0.1] * 6 + [0.7] * 6 + [0.9] * 8)
    logits, targets = logit(np.stack([a, b], axis=1)), np.stack([a > 0.3, b > 0.8], axis=1).astype(np.float32)
    found = choose_thresholds(SEVERAL, logits, targets)
    assert found == (pytest.approx(0.3), pytest.approx(0.8))
    task = Task(name="classification", labels=("a", "b"), multi_label=True, thresholds=found)
    assert task.decode(logit([[0.35, 0.75], [0.25, 0.85]])) == [["a"], ["b"]]
    assert SEVERAL.decode(logit([[0.35, 0.75], [0.25, 0.85]])) == [["b"], ["b"]]


def test_of_two_classes_the_rarer_one_is_found():
    yes = np.array([0.05] * 40 + [0.2] * 8)
    logits = np.stack([np.zeros(48), logit(yes)], axis=1)
    targets = (yes > 0.1).astype(np.int64)
    (at,) = choose_thresholds(TWO, logits, targets)
    assert at == pytest.approx(0.125)
    task = Task(name="classification", labels=("no", "yes"), thresholds=(at,))
    assert task.decode(logits[[0, -1]]) == ["no", "yes"] and TWO.decode(logits[[0, -1]]) == ["no", "no"]
    quality = judge(task, logits, targets, targets, 0.1)
    assert quality is not None and quality.score == 1, "the report goes by the thresholds"
    assert quality.calibration_error == pytest.approx((40 * 0.05 + 8 * 0.8) / 48), "sure is of what was answered"


def test_few_rows_choose_nothing_and_equals_stay_at_one_half():
    p = np.array([0.1] * 20 + [0.3] * (FEWEST - 1))
    logits = np.stack([np.zeros(len(p)), logit(p)], axis=1)
    assert choose_thresholds(TWO, logits, (p > 0.2).astype(np.int64)) == (0.5,)
    clear = np.array([0.1] * 9 + [0.8] * 9)
    logits = np.stack([np.zeros(18), logit(clear)], axis=1)
    assert choose_thresholds(TWO, logits, (clear > 0.5).astype(np.int64)) == (0.5,), "0.45 is no better"


def test_tasks_without_thresholds_are_refused_by_name():
    for task in (Task(name="classification", labels=("a", "b", "c")), Task(name="regression")):
        with pytest.raises(ConfigError, match="without a threshold"):
            check_thresholds(task)
    check_thresholds(SEVERAL)
    with pytest.raises(ConfigError, match=r"eval\.share"):
        EvalSpec(thresholds=True, share=0)

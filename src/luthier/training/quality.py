"""What came out, judged: a score with its interval, what guessing gives, class by class, and what is no result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import key, share_interval
from luthier.data.tasks import Task
from luthier.training import metrics

__all__ = ["ClassQuality", "Quality", "beside_plain", "judge", "sureness"]

RESAMPLES = 1000
BINS = 15
"""Of equal width, for the calibration error."""
LEAST = 1e-12
"""Of a probability whose logarithm is taken."""
SURE = 0.9
BADLY = 0.5
"""A class with a lower recall than this is learnt badly."""
FEW_ROWS = 100
"""Of a class to learn from: with fewer, more rows are the better advice than more steps."""


@dataclass(frozen=True, kw_only=True)
class ClassQuality:
    """One class: what of it was found, and how much of what was called so is right."""

    name: str
    precision: float
    recall: float
    f1: float
    rows: int
    """held-out rows of this class"""
    answered: int
    """held-out rows that were called so"""
    learnt: int
    """training rows of this class"""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What the answers on held-out rows are worth. Plain values only."""

    rows: int
    metric: str
    score: float
    low: float
    high: float
    """95 % interval of the score over rows like these"""
    baseline: float | None = None
    """the same score of always answering the same"""
    baseline_answer: str = ""
    by_words: float | None = None
    """the same score of counted words (TF-IDF) with logistic regression; None where it was not computed"""
    classes: tuple[ClassQuality, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    """rows of each class (down) by the answer (across), in the order of `classes`"""
    calibration_error: float | None = None
    """mean gap between how sure answers are and how often they are right"""
    brier: float | None = None
    """mean squared distance of a row's probabilities from the truth, over all classes: 0 to 2"""
    nll: float | None = None
    """mean negative logarithm of the probability of the right class"""
    temperature: float | None = None
    """by which probabilities are sharpened or flattened, fitted on rows held out to select by"""
    calibrated_calibration_error: float | None = None
    calibrated_brier: float | None = None
    calibrated_nll: float | None = None
    """the same three at that temperature"""
    plain_calibration_error: float | None = None
    """the gap of the model alone, where a method answers otherwise"""
    plain_nll: float | None = None
    """the same of its probabilities"""
    sure_but_wrong: tuple[int, ...] = ()
    """held-out rows, by number, that were answered wrongly with the most certainty"""
    warnings: tuple[str, ...] = ()
    """what makes this no result, or a doubtful one, each with what to try"""

    @property
    def is_result(self) -> bool:
        """Whether nothing speaks against using it."""
        return not any(w.startswith(NO_RESULT) for w in self.warnings)


NO_RESULT = "No result: "


def judge(
    task: Task, logits: NDArray[Any], targets: NDArray[Any], learnt: NDArray[Any], loss: float,
    by_words: NDArray[np.int64] | None = None,
) -> Quality | None:  # fmt: skip
    """Judge the answers on held-out rows.

    Args:
        logits: of the held-out rows, (rows, outputs).
        targets: of the same rows, as `Task.targets` gives them.
        learnt: targets of the training rows.
        loss: mean loss of the held-out rows.
        by_words: what counted words answer to the held-out rows.

    Returns:
        None for tasks whose rows have no one label or number.
    """
    if task.name == "regression":
        return _numbers(task, logits, targets, learnt)
    if task.name == "classification" and not task.multi_label:
        return _classes(task, logits, targets.astype(np.int64), learnt.astype(np.int64), loss, by_words)
    return None


def beside_plain(quality: Quality, task: Task, logits: NDArray[Any], targets: NDArray[Any], loss: float) -> Quality:
    """The same with what the model alone would have answered beside it: `logits` (rows, classes) and their loss."""
    if quality.calibration_error is None:
        return quality
    said = task.chosen(logits)
    sure = task.probabilities(logits)[np.arange(len(said)), said]
    error = _calibration_error(sure, said == targets.astype(np.int64))
    return replace(quality, plain_calibration_error=error, plain_nll=loss)


def _classes(
    task: Task, logits: NDArray[Any], wanted: NDArray[np.int64], learnt: NDArray[np.int64], loss: float,
    by_words: NDArray[np.int64] | None,
) -> Quality:  # fmt: skip
    n, n_classes = len(wanted), len(task.labels)
    said = task.chosen(logits)
    chances = task.probabilities(logits)
    sure = chances[np.arange(n), said]  # of what is answered; a threshold may take the less likely
    right = said == wanted
    confusion = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(confusion, (wanted, said), 1)
    seen = np.bincount(learnt, minlength=n_classes)
    low, high = share_interval(int(right.sum()), n)
    most = int(seen.argmax())
    classes = tuple(_one(task.labels[i], confusion, i, int(seen[i])) for i in range(n_classes))
    accuracy, baseline = float(right.mean()), float((wanted == most).mean())
    wrong = np.flatnonzero(~right & (sure >= SURE))
    fits = sureness(chances, said, wanted)
    worded = None if by_words is None else float((by_words == wanted).mean())
    warnings = _class_warnings(classes, said, accuracy, low, baseline, task.labels[most], loss)
    return Quality(
        rows=n,
        metric="accuracy",
        score=accuracy,
        low=low,
        high=high,
        baseline=baseline,
        baseline_answer=task.labels[most],
        classes=classes,
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
        calibration_error=fits["calibration_error"],
        brier=fits["brier"],
        nll=fits["nll"],
        sure_but_wrong=tuple(int(i) for i in wrong[np.argsort(-sure[wrong], kind="stable")][:10]),
        by_words=worded,
        warnings=(*warnings, *_words_win(accuracy, worded, n)),
    )


def sureness(chances: NDArray[Any], said: NDArray[Any], wanted: NDArray[np.int64]) -> dict[str, float]:
    """How well certainty fits: the calibration error, the Brier score, the mean negative log-likelihood.

    Args:
        chances: (rows, classes); said, wanted: classes, (rows,).
    """
    rows = np.arange(len(wanted))
    return {
        "calibration_error": _calibration_error(chances[rows, said], said == wanted),
        "brier": float(((chances - np.eye(chances.shape[1])[wanted]) ** 2).sum(axis=1).mean()),
        "nll": float(-np.log(np.maximum(chances[rows, wanted], LEAST)).mean()),
    }


def _one(name: str, confusion: NDArray[np.int64], i: int, learnt: int) -> ClassQuality:
    hit, rows, answered = (int(v) for v in (confusion[i, i], confusion[i].sum(), confusion[:, i].sum()))
    return ClassQuality(
        name=name,
        precision=hit / answered if answered else 0.0,
        recall=hit / rows if rows else 0.0,
        f1=2 * hit / (rows + answered) if rows + answered else 0.0,
        rows=rows,
        answered=answered,
        learnt=learnt,
    )


def _class_warnings(
    classes: Sequence[ClassQuality], said: NDArray[Any], accuracy: float, low: float, baseline: float, most: str,
    loss: float,
) -> tuple[str, ...]:  # fmt: skip
    found = []
    answers, present = {int(v) for v in said}, sum(c.rows > 0 for c in classes)
    if len(answers) == 1 and present > 1:
        found.append(
            f"{NO_RESULT}every row is answered {classes[answers.pop()].name!r}. Train longer (--epochs), with another "
            "rate (--lr), or on more rows of the other classes."
        )
    elif accuracy <= baseline:
        found.append(
            f"{NO_RESULT}always answering {most!r} would be right in {baseline:.1%} of these rows, which is no worse. "
            "Train longer (--epochs) or with another rate (--lr), and check the labels."
        )
    elif low <= baseline:
        found.append(
            f"Doubtful: always answering {most!r} would be right in {baseline:.1%} of these rows, inside the interval "
            "of the score. More held-out rows would tell (--test-share, --cv 5), or longer training (--epochs)."
        )
    guessing = math.log(len(classes))
    if loss > 1.05 * guessing:  # nearer to it nothing was learnt yet, and nothing is certain
        found.append(
            f"Doubtful: the loss, {loss:.2f}, is above that of guessing, {guessing:.2f}: wrong answers are given with "
            "certainty. Do not trust the probabilities; fewer epochs or a lower rate may help."
        )
    badly = [c for c in classes if c.rows and c.recall < BADLY]
    if badly and len(answers) != 1:
        shown = "; ".join(
            f"{c.name!r} ({c.recall:.0%} of {c.rows} rows found, {c.learnt} rows to learn from)" for c in badly[:5]
        )
        more = f"; and {len(badly) - 5} more" if len(badly) > 5 else ""
        few = sum(c.learnt < FEW_ROWS for c in badly) * 2 >= len(badly)
        advice = (
            "More rows of them help most." if few else "Train longer (--epochs), or look at what they are taken for."
        )
        found.append(f"Learnt badly: {shown}{more}. {advice}")
    return tuple(found)


def _words_win(accuracy: float, by_words: float | None, n: int) -> tuple[str, ...]:
    """What is said where counted words do as well."""
    if by_words is None or by_words < accuracy:
        return ()
    noise = math.sqrt(by_words * (1 - by_words) / n)
    beyond = "" if by_words - accuracy > noise else ", though the difference is within the noise of so few rows"
    return (
        f"Doubtful: counted words (TF-IDF) with logistic regression are right in {by_words:.1%} of these rows, this "
        f"run in {accuracy:.1%}{beyond}. Either words tell all there is to tell, or too little was learnt: train "
        "longer (--epochs), with a method that changes more of the model (--method), or take a larger model.",
    )


def _numbers(task: Task, logits: NDArray[Any], targets: NDArray[Any], learnt: NDArray[Any]) -> Quality:
    said, wanted = task.in_unit(logits), task.in_unit(targets)
    score = metrics.METRICS["pearson"].function
    assert score is not None
    value = float(score(said.tolist(), wanted.tolist()))
    draw = np.random.Generator(np.random.Philox(key("quality", len(wanted))))
    again = []
    for _ in range(RESAMPLES if len(wanted) > 2 else 0):
        rows = draw.integers(0, len(wanted), len(wanted))
        again.append(score(said[rows].tolist(), wanted[rows].tolist()))
    low, high = (float(np.percentile(again, q)) for q in (2.5, 97.5)) if again else (-1.0, 1.0)
    error = float(np.mean((said - wanted) ** 2))
    constant = float(np.mean((wanted - task.in_unit(learnt).mean()) ** 2))
    found = []
    if float(said.std()) <= 1e-3 * float(wanted.std()):
        found.append(
            f"{NO_RESULT}every row is answered {said.mean():.4g}. Train longer (--epochs) or with another rate (--lr)."
        )
    elif error >= constant:
        found.append(
            f"{NO_RESULT}always answering the mean of the training rows has a squared error of {constant:.4g}, "
            f"which is no worse than {error:.4g}. Train longer (--epochs) or with another rate (--lr)."
        )
    return Quality(rows=len(wanted), metric="pearson", score=value, low=low, high=high, warnings=tuple(found))


def _calibration_error(sure: NDArray[Any], right: NDArray[Any]) -> float:
    """Expected calibration error: over bins of certainty, the gap between certainty and accuracy, by rows."""
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    gaps = [
        abs(float(sure[bins == b].mean()) - float(right[bins == b].mean())) * int((bins == b).sum())
        for b in np.unique(bins)
    ]
    return sum(gaps) / len(sure)

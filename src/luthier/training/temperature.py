"""One number by which certainty is set right: fitted on rows held out to select by, never on those that are scored.

Probabilities p become p^(1/T), scaled to one: with T above 1 answers are less sure, and no answer changes. Guo et al.
2017, "On Calibration of Modern Neural Networks" (arXiv:1706.04599).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError
from luthier.data.tasks import Task
from luthier.training.quality import LEAST, Quality, sureness

__all__ = ["calibrated", "check_calibrate", "fit_temperature", "tempered"]

COLDEST, HOTTEST = 0.02, 50.0
"""Bounds of T: where every held-out row is answered rightly, the best T would be 0."""
HALVINGS = 60


def check_calibrate(task: Task) -> None:
    """Refuse tasks whose answers are no probabilities of one label.

    Raises:
        ConfigError: numbers, tags, text, or several labels a row.
    """
    if task.name == "classification" and not task.multi_label:
        return
    what = "several labels a row" if task.name == "classification" else f"task {task.name}"
    raise ConfigError(
        f"eval.calibrate: the run learns {what}, and a temperature is fitted to the probabilities of one label a row. "
        "Leave it out."
    )


def fit_temperature(chances: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    """The temperature with the lowest mean negative log-likelihood of the right labels.

    That is convex in 1/T, so the place where its slope changes sign is halved towards.

    >>> round(fit_temperature(np.array([[0.99, 0.01], [0.99, 0.01], [0.99, 0.01], [0.99, 0.01]]),
    ...                       np.array([0, 0, 0, 1])), 2)
    4.18

    Args:
        chances: probabilities of the held-out rows, (rows, classes).
        targets: their classes, (rows,).
    """
    logs = np.log(np.maximum(chances, LEAST))
    right = logs[np.arange(len(targets)), targets].mean()
    low, high = 1 / HOTTEST, 1 / COLDEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if (_sharpened(logs, middle) * logs).sum(axis=1).mean() > right:
            high = middle
        else:
            low = middle
    return float(2 / (low + high))


def tempered(chances: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """The probabilities at a temperature, (rows, classes)."""
    return _sharpened(np.log(np.maximum(chances, LEAST)), 1 / temperature)


def _sharpened(logs: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    scaled = power * (logs - logs.max(axis=1, keepdims=True))
    weights = np.exp(scaled)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def calibrated(
    quality: Quality, task: Task, logits: NDArray[Any], targets: NDArray[Any], temperature: float
) -> Quality:  # fmt: skip
    """The same with what certainty is worth at a temperature beside it: `logits` (rows, classes) are those judged."""
    chances = tempered(task.probabilities(logits), temperature)
    found = sureness(chances, task.chosen(logits), targets.astype(np.int64))
    return replace(
        quality, temperature=temperature, calibrated_calibration_error=found["calibration_error"],
        calibrated_brier=found["brier"], calibrated_nll=found["nll"],
    )  # fmt: skip

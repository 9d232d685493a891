"""From which probability on a label is answered: chosen on rows that were held out to select by."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError
from luthier.data.tasks import Task

__all__ = ["check_thresholds", "choose_thresholds", "thresholds_said"]

FEWEST = 5
"""With fewer held-out rows that have a label, or that lack it, its threshold stays at one half."""
SHOWN = 12


def check_thresholds(task: Task) -> None:
    """Refuse tasks whose answers have no threshold.

    Raises:
        ConfigError: more than two classes, numbers, tags, or text.
    """
    if task.has_thresholds:
        return
    what = f"one of {len(task.labels)} classes" if task.name == "classification" else f"task {task.name}"
    raise ConfigError(
        f"eval.thresholds: the run learns {what}, which is answered without a threshold. Thresholds are chosen for two "
        "classes and for several labels a row. Leave it out; classes that are rare are helped by more of their rows."
    )


def choose_thresholds(task: Task, logits: NDArray[Any], targets: NDArray[Any]) -> tuple[float, ...]:
    """The thresholds that are best on these rows.

    Of several labels, each has the one with the best F1 of this label; of two classes, the second has the one with the
    best mean F1 of both. Where several are equally good, the one nearest to one half is taken.

    Args:
        logits: (rows, labels).
        targets: as `Task.targets` gives them: (rows, labels) of 0 and 1, or (rows,) class numbers.
    """
    chances = task.probabilities(logits)
    if task.multi_label:
        wanted = targets > 0
        return tuple(_best(chances[:, i], wanted[:, i], both=False) for i in range(len(task.labels)))
    return (_best(chances[:, 1], targets == 1, both=True),)


def _best(chances: NDArray[np.float64], wanted: NDArray[np.bool_], *, both: bool) -> float:
    if min(int(wanted.sum()), int((~wanted).sum())) < FEWEST:
        return 0.5
    seen = np.unique(chances)
    # Between two neighbours all thresholds answer alike; the middle is farthest from both.
    between = [*((seen[1:] + seen[:-1]) / 2), 0.5]
    scored = [(_score(chances >= at, wanted, both), -abs(at - 0.5), at) for at in between]
    return float(max(scored)[2])


def _score(said: NDArray[np.bool_], wanted: NDArray[np.bool_], both: bool) -> float:
    score = _f1(said, wanted)
    return (score + _f1(~said, ~wanted)) / 2 if both else score


def _f1(said: NDArray[np.bool_], wanted: NDArray[np.bool_]) -> float:
    hit = int((said & wanted).sum())
    return 2 * hit / max(1, int(said.sum()) + int(wanted.sum()))


def thresholds_said(task: Task, n_rows: int) -> str:
    """What was chosen, in a sentence."""
    labels = task.labels if task.multi_label else task.labels[1:]
    each = [f"{name!r} from {at:.2f}" for name, at in zip(labels, task.thresholds, strict=True)]
    more = [f"and {len(each) - SHOWN} more"] if len(each) > SHOWN else []
    return (
        f"probability from which a label is answered, chosen on the {n_rows} rows held out to select by: "
        f"{', '.join([*each[:SHOWN], *more])}; predict and evaluate go by it"
    )

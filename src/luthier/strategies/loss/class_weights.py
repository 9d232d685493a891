"""Rare classes count more: the loss of each target is multiplied by the weight of its class.

    L = sum_i w[y_i] * CE_i / n                   balanced: w[c] = n / (C * n_c),  n_c targets of class c, C classes

Balanced weights are 1 on average over the training rows, so the size of the loss, and what a good rate is, stays. They
are counted once, before step 1. Targets are rows, or tags of words.

Paper: King & Zeng 2001, "Logistic Regression in Rare Events Data", whose correction the balanced weights are in spirit.

Neutral: weights = "equal".
Claims: none of ours. The loss stops preferring the frequent class; what that does to your score is yours to measure.
Pitfalls: accuracy may fall while macro F1 rises, and probabilities are no longer those of the data. The scores that a
run prints weigh nothing. Smoothing of labels (label_smoothing) is not weighted.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import ConfigError, near
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import Told


@STRATEGIES.register("class_weights", family="loss", paper="King & Zeng 2001")
@dataclass(frozen=True, kw_only=True)
class ClassWeights(Strategy):
    """A weight for each class."""

    neutral: ClassVar[dict[str, Any] | None] = {"weights": "equal"}
    shortcut: ClassVar[str] = "weights"
    tiny: ClassVar[dict[str, Any]] = {"weights": "good=3,red=0.5"}

    weights: Annotated[str, "balanced, equal, or one for each class: good=2,bad=0.5; classes left out count 1"] = (
        "balanced"
    )

    def check(self, spec: RunSpec) -> None:
        self._given()

    def suits(self, task: Task) -> str | None:
        if task.name not in ("classification", "token_classification") or task.multi_label:
            return "weights are of classes, one for each row or word. Leave class_weights out."
        unknown = [name for name in self._given() if name not in task.labels]
        if unknown:
            return (
                f"it has no class {unknown[0]!r}.{near(unknown[0], task.labels)} Its classes: {', '.join(task.labels)}."
            )
        return None

    def start(self, course: Course) -> None:
        labels = course.task.labels
        weights = torch.ones(len(labels), dtype=torch.float64)
        if self.weights == "balanced":
            examples = course.examples()
            found = examples.row_targets if examples.targets is not None else examples.labels
            classes = torch.as_tensor(found).long()
            counts = torch.bincount(classes[classes != IGNORED], minlength=len(labels))  # (C,)
            weights = counts.sum() / (len(labels) * counts.clamp(min=1))
        for name, weight in self._given().items():
            weights[labels.index(name)] = weight
        course.memory.tensors["of_class"] = weights.float()

    def weigh(self, course: Course, piece: Piece, told: Told) -> Tensor:
        return course.memory.tensors["of_class"].to(told.losses.device)[told.labels]

    def _given(self) -> dict[str, float]:
        """Class -> weight, of those that are written out."""
        found: dict[str, float] = {}
        for part in self.weights.split(",") if self.weights not in ("balanced", "equal") else ():
            name, _, number = part.rpartition("=")
            try:
                found[name.strip()] = float(number)
            except ValueError:
                found[name.strip()] = -1.0
            if not name.strip() or not 0 <= found[name.strip()] < float("inf"):
                raise ConfigError(
                    f"class_weights.weights: {part!r} is no class with a weight of 0 or more. Write balanced, "
                    "equal, or weights such as good=2,bad=0.5."
                )
        return found

"""Keep the old model's answers to the new rows while learning the new ones.

    L = CE(z, y) + weight T^2 KL(softmax(z_old / T) || softmax(z / T))            z: (targets, classes)

No old rows are needed: the old model answers the new ones. `old` names what the model was before, a finished run or a
folder. In a language model it may be left out: then it is the base, with the tuning asleep.

Paper: arXiv:1606.09282. It keeps a head for each old task; here old and new answers are of one head, so the labels must
be the same.

Neutral: weight = 0.
Cost: one forward pass of the old model in every step; with labels, one over the rows in all.
Claims: old abilities suffer less than in plain fine-tuning, at the same accuracy on new rows.
Pitfalls: it helps where old and new rows are alike. Where the old model is wrong about the new rows, the two parts of
the loss pull apart. Chunked loss of a language model is switched off: all logits are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import above, at_least
from luthier.data.tasks import Task
from luthier.training.course import Course, Piece
from luthier.training.other_models import soft_loss
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("lwf", family="stay_near", paper="arXiv:1606.09282")
@dataclass(frozen=True, kw_only=True)
class LwF(Strategy):
    """Learning without forgetting."""

    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    roles: ClassVar[tuple[str, ...]] = ("old",)

    old: Annotated[str, "the model before: a finished run, or a model folder with its head; '' for the base"] = ""
    weight: Annotated[float, "of the old model's answers", at_least(0)] = 1.0
    temperature: Annotated[float, "divides both models' logits before they are compared", above(0)] = 2.0

    def suits(self, task: Task) -> str | None:
        if task.name == "regression":
            return "a number has no distribution. Use l2_sp or ewc, which hold weights."
        if not self.old and not task.of_words:
            return "the base has no head for its labels, so no old answers. Name a finished run: --set old=runs/before."
        return None

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        result = forward()
        old = course.models["old"].logits(piece.batch) if self.old else _of_the_base(course, piece)
        result.loss = result.loss + self.weight * soft_loss(course.task, old, result, self.temperature)
        return result


@torch.no_grad()
def _of_the_base(course: Course, piece: Piece) -> Tensor:
    with course.still(), course.tuned.base_only():
        logits = course.forward(piece.batch).logits
    assert logits is not None
    return logits

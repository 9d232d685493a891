"""The wanted answer is not quite certain: a small share of it goes to all classes alike.

    L = (1 - eps) * CE(p, y) + eps * mean_c(-log p_c)          the cross-entropy with (1 - eps) onehot(y) + eps / C

Where a row may have several labels, each is a question with two answers. In a language model the classes are the words.

Paper: arXiv:1512.00567, section 7 (label-smoothing regularisation), which uses eps = 0.1.

Neutral: eps = 0.
Claims: a small gain in accuracy on ImageNet. Nothing is promised for fine-tuning.
Pitfalls: the loss of training no longer falls to 0. Probabilities become less sure, for better where they were too
sure, for worse where they are used as they are. Chunked loss of a language model is switched off: all logits are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import between
from luthier.data.tasks import Task
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import log_chances, told_of


@STRATEGIES.register("label_smoothing", family="loss", paper="arXiv:1512.00567")
@dataclass(frozen=True, kw_only=True)
class LabelSmoothing(Strategy):
    """A share of each target for all classes."""

    neutral: ClassVar[dict[str, Any] | None] = {"eps": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    shortcut: ClassVar[str] = "eps"

    eps: Annotated[float, "share of each target that all classes get", between(0, 1)] = 0.1

    def suits(self, task: Task) -> str | None:
        return "it has numbers and no classes to smooth. Leave it out." if task.name == "regression" else None

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        result = forward()
        told = told_of(course.task, result)
        each = -log_chances(course.task, told.logits).mean(-1)  # (targets,), or (targets, labels)
        even = each.mean(-1).sum() if course.task.multi_label else each.sum()
        result.loss = (1 - self.eps) * result.loss + self.eps * even
        return result

"""Learn a teacher's whole distribution of answers, not only which answer is right.

    L = alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y)      z: (targets, classes)

z_t are the teacher's logits, z_s the student's. T^2 keeps the gradient of the first part as large as that of the second
where T changes. In a language model or with tags a target is a token. Where a row may have several labels, each is a
question with two answers.

A row with one answer is asked once, before step 1, in the teacher's own tokens; the teacher is then let go. So teacher
and student may have different tokenizers there. Tokens and tags are asked in every step, of a teacher with the same
vocabulary.

Paper: arXiv:1503.02531, section 2.

Neutral: alpha = 0.
Cost: with labels, one forward pass of the teacher over the rows in all; with words or tags, one in every step.
Claims: a small model that comes nearer to a large one than by labels alone.
Pitfalls: a teacher that was trained on the same rows is sure of its answers there; a higher T shows what it leaves in
doubt. Its mistakes are learnt too. Chunked loss of a language model is switched off: all logits are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, above, between
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.other_models import soft_loss
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("kd_logits", family="distillation", paper="arXiv:1503.02531")
@dataclass(frozen=True, kw_only=True)
class KDLogits(Strategy):
    """Soft labels of a teacher."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    roles: ClassVar[tuple[str, ...]] = ("teacher",)

    teacher: Annotated[str, "the model to learn from: a finished run, or a model folder with its head"] = ""
    alpha: Annotated[float, "share of the teacher in the loss; the rest is the labels'", between(0, 1)] = 0.5
    temperature: Annotated[float, "divides both models' logits before they are compared", above(0)] = 2.0

    def check(self, spec: RunSpec) -> None:
        if not self.teacher:
            raise ConfigError("kd_logits.teacher: no teacher is named. Give a finished run: --set teacher=runs/large.")

    def suits(self, task: Task) -> str | None:
        return "a number has no distribution. Learn the teacher's numbers as labels." * (task.name == "regression")

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        result = forward()
        wanted = course.models["teacher"].logits(piece.batch)
        soft = soft_loss(course.task, wanted, result, self.temperature)
        result.loss = (1 - self.alpha) * result.loss + self.alpha * soft
        return result

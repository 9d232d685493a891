"""Learn what several teachers say together: the mean of their logits, as soft labels.

    L = alpha T^2 KL(softmax(z / T) || softmax(z_s / T)) + (1 - alpha) CE(z_s, y)      z = sum_k w_k z_k / sum_k w_k

z_k are the logits of teacher k, z_s the student's. Each teacher is asked once for every row, before step 1, in its own
tokens and by its own template where it has one; then it is let go.

Paper: arXiv:2001.07676 (its last step; T = 2), after arXiv:1503.02531.

Neutral: alpha = 0.
Cost: one forward pass of each teacher over the rows in all.
Claims: the ensemble is better than its members, and the student keeps most of that.
Pitfalls: logits are averaged, so a teacher that is sure of itself counts more. Words and tags are refused: there a
teacher is asked in every step, which kd_logits does for one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import ConfigError, above, at_least, between
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.other_models import soft_loss
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("kd_ensemble", family="distillation", paper="arXiv:2001.07676")
@dataclass(frozen=True, kw_only=True)
class KDEnsemble(Strategy):
    """Soft labels of several teachers."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    roles: ClassVar[tuple[str, ...]] = ("teachers",)

    teachers: Annotated[str, "the models to learn from, parted by commas: finished runs"] = ""
    weights: Annotated[tuple[float, ...] | None, "what each teacher counts; left out, all alike", at_least(0)] = None
    alpha: Annotated[float, "share of the teachers in the loss; the rest is the labels'", between(0, 1)] = 1.0
    temperature: Annotated[float, "divides the logits of both sides before they are compared", above(0)] = 2.0

    def models(self) -> dict[str, str]:
        names = [name.strip() for name in self.teachers.split(",") if name.strip()]
        return {f"teacher{k}": name for k, name in enumerate(names)}

    def check(self, spec: RunSpec) -> None:
        n = len(self.models())
        if n == 0:
            raise ConfigError("kd_ensemble.teachers: no teacher is named. Give finished runs: 'runs/one,runs/two'.")
        if self.weights is not None and (len(self.weights) != n or not 0 < sum(self.weights) < float("inf")):
            raise ConfigError(f"kd_ensemble.weights: give {n} numbers, one for each teacher, not all 0, none endless.")

    def suits(self, task: Task) -> str | None:
        return "it averages answers to whole rows. Use kd_logits." if task.name != "classification" else None

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        result = forward()
        soft = soft_loss(course.task, self.wanted(course, piece), result, self.temperature)
        result.loss = (1 - self.alpha) * result.loss + self.alpha * soft
        return result

    def wanted(self, course: Course, piece: Piece) -> Tensor:
        """The weighted mean of the teachers' logits, (rows, classes)."""
        each = torch.stack([course.models[role].logits(piece.batch) for role in self.models()])
        shares = each.new_tensor(self.weights or [1.0] * len(each))
        return torch.einsum("k,krc->rc", shares / shares.sum(), each)

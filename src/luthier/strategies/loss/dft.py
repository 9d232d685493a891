"""Each token's loss is multiplied by the chance that the model gives it: what it finds absurd it hardly learns.

    L = sum_t sg(p_t) * (-log p_t) / n                  sg: no gradient through the factor

The gradient of plain fine-tuning is that of a reward of 1 / p_t for the token that was wanted; the factor undoes it.
Targets are tokens of answers, or rows with labels.

Paper: arXiv:2508.05629.

Neutral: none; without the factor it is the plain loss.
Claims: better answers to mathematical problems than supervised fine-tuning, and more general ones. Not measured here.
Pitfalls: with a new head all chances start near 1 / C, and so the loss and its gradient are small: give a higher rate.
What the base model finds impossible, such as a new fact, is not learnt. The loss is not chunked: all logits are held.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from luthier.data.tasks import Task
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import Told


@STRATEGIES.register("dft", family="loss", paper="arXiv:2508.05629")
@dataclass(frozen=True, kw_only=True)
class DFT(Strategy):
    """Dynamic fine-tuning's loss."""

    neutral: ClassVar[None] = None

    def suits(self, task: Task) -> str | None:
        return "a number has no chance to be answered right. Leave it out." if task.name == "regression" else None

    def weigh(self, course: Course, piece: Piece, told: Told) -> Tensor:
        return told.chances.detach()

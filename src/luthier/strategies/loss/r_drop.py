"""Two passes with different dropout must agree: there is a price for how far their answers lie apart.

    L = (CE(p1, y) + CE(p2, y)) / 2 + alpha * (KL(p1 || p2) + KL(p2 || p1)) / 2

The sum is over targets, as in the task's own loss. Dropout of the trunk is on, also where the trunk is frozen.

Paper: arXiv:2106.14448; halved as in the authors' code, where the paper adds the two losses up.

Neutral: alpha = 0, which makes one pass.
Cost: one forward and backward pass more in each step.
Claims: better translation, summaries and GLUE scores than plain fine-tuning. The default alpha is our choice.
Pitfalls: twice the time of a step, and the activations of two passes at once. Without dropout there is nothing to
agree on: trunk_dropout = "off" is refused. A language model's loss is not chunked: all logits are held.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import ConfigError, at_least
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import apart, told_of


@STRATEGIES.register("r_drop", family="loss", paper="arXiv:2106.14448")
@dataclass(frozen=True, kw_only=True)
class RDrop(Strategy):
    """Regularised dropout."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits", "states")
    drops: ClassVar[bool] = True
    extra_passes: ClassVar[float] = 1.0

    alpha: Annotated[float, "price of how far the two answers lie apart", at_least(0)] = 1.0

    def check(self, spec: RunSpec) -> None:
        if spec.trunk_dropout == "off":
            raise ConfigError('r_drop compares two dropouts, and trunk_dropout is "off". Leave trunk_dropout out.')

    def suits(self, task: Task) -> str | None:
        return "a number is no distribution to compare. Leave it out." if task.name == "regression" else None

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        one = forward()
        if not self.alpha:
            return one
        other = forward()  # the draws of dropout go on where the first pass ended
        far = apart(course.task, told_of(course.task, one).logits, told_of(course.task, other).logits)
        course.note("apart", float(far.detach()) / max(1, piece.n_targets))
        one.loss = (one.loss + other.loss) / 2 + self.alpha * far / 2
        return one

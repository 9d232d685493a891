"""What is answered well counts less: each target's loss times a power of the chance that was missed.

    L = sum_i (1 - p_i)^gamma * CE_i / n                       p_i: what the wanted answer is given, with gradient

The weights of classes that the paper combines it with are class_weights beside it: factors multiply. Where a row may
have several labels, each is a question with two answers.

Paper: arXiv:1708.02002, equation 4; it found gamma = 2 the best in its experiments.

Neutral: gamma = 0.
Claims: better detection of objects, where a thousand easy negatives hide each positive. For texts nothing is promised.
Pitfalls: the loss becomes small, and with it the gradient: a higher rate may be needed. With wrong labels in the data
they are what it looks at most. A language model's loss is not chunked: all logits are held.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from luthier.core import at_least
from luthier.data.tasks import Task
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import Told


@STRATEGIES.register("focal", family="loss", paper="arXiv:1708.02002")
@dataclass(frozen=True, kw_only=True)
class Focal(Strategy):
    """Focal loss."""

    neutral: ClassVar[dict[str, Any] | None] = {"gamma": 0.0}

    gamma: Annotated[float, "power of the missed chance; the higher, the less easy targets count", at_least(0)] = 2.0

    def suits(self, task: Task) -> str | None:
        return "a number has no chance to be answered right. Leave it out." if task.name == "regression" else None

    def weigh(self, course: Course, piece: Piece, told: Told) -> Tensor:
        # Not quite 0: a power below 1 has no slope there.
        return (1 - told.chances).clamp(min=1e-7) ** self.gamma

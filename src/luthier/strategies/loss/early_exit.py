"""The head learns to answer from every block, so that a row may be answered before the last one.

    L = (1 - w) L_N + w sum_l l L_l / sum_l l       L_l: the task's loss of the head on what block l gives, l = 1 ... N

The model's one head, with its pooler, reads all blocks; deep ones count more. At answering
`luthier.training.exits.leave_early` runs blocks until the entropy of a row's answer is below a threshold, and says how
many were run. `luthier predict` and exported models run all of them, with what the head has learnt.

Paper: arXiv:2006.04152 (weights by depth). There and in arXiv:2004.12993 each block has a head of its own; one shared
head, as in arXiv:2404.16710, needs nothing that a saved tuning does not hold. Leaving when several exits agree is not
built, nor exits while a decoder writes.

Neutral: weight = 0.
Cost: the head once more for each block, which is little; frozen features are switched off.
Claims: rows that are easy are answered from the lower half, at a small loss of score.
Pitfalls: a method that trains little leaves low blocks as they are, which the head can read only in part: best with
full. The last answer may be worse than without. Models with one last norm behind all blocks are refused. Rows of one
batch leave when they like, yet the batch runs until its last: small batches gain most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import Tensor

from luthier.core import between
from luthier.data.tasks import Task
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.exits import Exits
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("early_exit", family="loss", paper="arXiv:2006.04152")
@dataclass(frozen=True, kw_only=True)
class EarlyExit(Strategy):
    """A loss at every block."""

    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("states",)
    tiny_kind: ClassVar[str] = "bert"

    weight: Annotated[float, "share of the mean over blocks; the rest is the last block's", between(0, 1)] = 1.0

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"what {other.name} trains stands beside the trunk, and its blocks know nothing of it."
        return None

    def suits(self, task: Task) -> str | None:
        if task.of_words or task.template or task.name == "token_classification":
            return "it asks a head of labels for whole rows. Leave it out."
        return None

    def start(self, course: Course) -> None:
        Exits(course.tuned)  # refuses models whose head cannot read what stands between blocks

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.weight:
            return forward()
        exits, states = Exits(course.tuned), list[Tensor]()
        with exits.watched(states.append):
            result = forward()
        assert course.objective is not None
        each = [
            course.objective.loss(exits.logits(piece.batch.inputs, x), piece.batch.labels)
            for x in states[: exits.n_layers - 1]
        ]
        each.append(result.loss)
        course.note("first", float(each[0].detach()) / max(1, piece.n_targets))
        total = sum((n * loss for n, loss in enumerate(each, 1)), result.loss.new_zeros(()))
        mean = total / (exits.n_layers * (exits.n_layers + 1) / 2)
        result.loss = (1 - self.weight) * result.loss + self.weight * mean
        return result

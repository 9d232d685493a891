"""The states of two rows are near each other where their labels are alike, and apart elsewhere; no head learns.

    L = mean over pairs of one label of (cos(h_i, h_j) - 1)^2 / 2 + mean over other pairs of cos(h_i, h_j)^2 / 2

Pairs are all those of a step: both kinds count alike, however many there are. h is the state that the head reads: of
the first token in an encoder, of the last one elsewhere. The head rests; a run of head_only follows (recipe setfit).

Paper: arXiv:2209.11055 (its first phase: pairs of the same label 1, of others 0, squared error of the cosine).

Neutral: none: it stands in the place of the task's loss.
Claims: with 8 to 64 rows a label the states part by label, so that a linear head suffices.
Cost: where a step is cut into micro-batches, a forward pass more of each.
Pitfalls: pairs are those inside a step, where the paper draws them from all rows: take steps of 16 rows or more. Of an
encoder for sentences the paper takes the mean state, not the first.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.data.tasks import Task
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.rows_of_a_step import by_rows, with_all_rows
from luthier.training.strategy import STRATEGIES, Strategy, fills


@STRATEGIES.register("contrastive", family="loss", paper="arXiv:2209.11055")
@dataclass(frozen=True, kw_only=True)
class Contrastive(Strategy):
    """Pairs of rows in place of labels."""

    reads: ClassVar[tuple[str, ...]] = ("states", "rows")

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and (not other.through_trunk or other.name == "head_only"):
            return f"what {other.name} trains does not move the trunk's states. Use a method inside the trunk."
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh")):
            return f"{other.name} changes the task's loss, and in its place pairs are learnt. Use one of the two."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label or task.template:
            return "it compares rows by the one label that each has. Leave it out."
        return None

    def trains(self, course: Course) -> Collection[str]:
        return course.weights(head=False)

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        with course.states() as seen:
            result = forward()
        states, labels = with_all_rows(course, piece, seen.pooled(piece.batch).float())
        result.loss = by_rows(self.pairs(states, labels), piece, len(labels))
        return result

    def pairs(self, states: Tensor, labels: Tensor) -> Tensor:
        """The loss of states (rows, d); pairs of one label and others count alike."""
        h = F.normalize(states, dim=-1)
        first, second = torch.triu_indices(len(h), len(h), 1, device=h.device)
        cosine = (h[first] * h[second]).sum(-1)  # (pairs,)
        alike = labels[first] == labels[second]
        kinds = [(cosine[alike] - 1).square(), cosine[~alike].square()]
        return torch.stack([kind.mean() for kind in kinds if len(kind)] or [cosine.sum() * 0]).sum() / 2

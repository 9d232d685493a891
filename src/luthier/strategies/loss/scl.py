"""States of rows with one label are drawn together, and those of others pushed apart, beside the cross-entropy.

    L = (1 - lambda) CE + lambda * mean_i l_i
    l_i = -1 / |P_i| * sum_{j in P_i} log( exp(h_i.h_j / tau) / sum_{k != i} exp(h_i.h_k / tau) )

P_i: other rows of the step with the label of i; rows without any are left out of the mean. h: the state of the first
token of an encoder, of the last one of other models, of length 1.

Paper: arXiv:2011.01403.

Neutral: weight = 0.
Cost: a table of rows by rows; where a step is cut into micro-batches, a forward pass more of each.
Claims: better than cross-entropy with few labelled rows. lambda = .9 and tau = .3 are quoted as typical there.
Pitfalls: a step must hold each class several times, so give batch.size = 16 or more. Rows of other micro-batches are
among those that a row is drawn to and pushed from, with the same gradient as in one piece. Where the head has a pooler,
the state is the one that goes into it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import above, between
from luthier.data.tasks import Task
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.rows_of_a_step import by_rows, with_all_rows
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("scl", family="loss", paper="arXiv:2011.01403")
@dataclass(frozen=True, kw_only=True)
class SCL(Strategy):
    """Supervised contrastive learning."""

    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("states", "rows")

    weight: Annotated[float, "lambda, the share of the contrastive loss", between(0, 1)] = 0.9
    tau: Annotated[float, "temperature; the lower, the more the nearest rows count", above(0)] = 0.3

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"what {other.name} trains does not move the trunk's states. Use a method inside the trunk."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label:
            return "it compares rows by the one label that each has. Leave it out."
        return None

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.weight:
            return forward()
        with course.states() as seen:
            result = forward()
        states, labels = with_all_rows(course, piece, seen.pooled(piece.batch).float())
        apart = self.contrast(states, labels)
        course.note("contrast", float(apart.detach()))
        result.loss = (1 - self.weight) * result.loss + self.weight * by_rows(apart, piece, len(labels))
        return result

    def contrast(self, states: Tensor, labels: Tensor) -> Tensor:
        """The contrastive loss of states (rows, d): a mean over rows that have another of their label; else 0."""
        h = F.normalize(states, dim=-1)
        itself = torch.eye(len(h), dtype=torch.bool, device=h.device)
        alike = (labels[:, None] == labels[None]) & ~itself  # (rows, rows)
        log_share = torch.log_softmax((h @ h.T / self.tau).masked_fill(itself, -torch.inf), -1)
        n_alike = alike.sum(-1)  # (rows,)
        each = -log_share.masked_fill(~alike, 0.0).sum(-1) / n_alike.clamp(min=1)
        return each.sum() / (n_alike > 0).sum().clamp(min=1)

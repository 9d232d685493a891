"""Of the rows of a step, learn those with the largest loss (online hard example mining).

    keep the ceil(share * B) rows with the largest l(x_i; theta)           theta as it is before the step

Losses are computed without dropout. The loss of the step is the mean over the targets of the rows that are kept.

Paper: arXiv:1604.03540, which selects regions of images; in text it is a transfer of ours. Selection by influence
(arXiv:2402.04333) is the strategy less.

Neutral: share = 1.
Cost: one forward pass of the step's rows; the backward pass is of the kept rows alone.
Claims: hard examples teach more than easy ones, in object detection.
Pitfalls: rows with wrong labels have large losses and are learnt first. With a share below 1 the steps are noisier.
Rows with words or tags to learn are refused: their targets are not of one row.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import torch

from luthier.core import between
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import told_of


@STRATEGIES.register("data_select", family="mixture", paper="arXiv:1604.03540")
@dataclass(frozen=True, kw_only=True)
class DataSelect(Strategy):
    """The hardest rows of each step."""

    neutral: ClassVar[dict[str, Any] | None] = {"share": 1.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    extra_forwards: ClassVar[float] = 1.0

    share: Annotated[float, "share of a step's rows that are learnt", between(0.01, 1)] = 0.5

    def suits(self, task: Task) -> str | None:
        if task.name in ("classification", "regression"):
            return None
        return "rows of several targets are not compared. Use focal, which weighs each target."

    @torch.no_grad()
    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        rows = np.concatenate([batch.rows for batch in batches])
        keep = int(np.ceil(self.share * len(rows)))
        if keep == len(rows):
            return batches
        with course.still():
            told = [told_of(course.task, course.forward(batch)).losses for batch in batches]
        losses = torch.cat([one.reshape(len(one), -1).sum(-1) for one in told]).cpu().numpy()  # (rows,)
        hardest = np.lexsort((rows, -losses))[:keep]
        return course.cut(np.sort(rows[hardest]))

"""A model beside the one that trains: a teacher, or what the model was before. It never learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.surgery import Tuned
from luthier.training.objective import Result
from luthier.training.told import log_chances, told_of

__all__ = ["OtherModel", "soft_loss"]


@dataclass(frozen=True, kw_only=True)
class OtherModel:
    """Its answers to the rows of the run: kept from before step 1 where a row has one answer, else asked live.

    Attributes:
        name: what the spec calls it.
        answers: logits of every training example, (examples, classes); kept, the model itself is let go.
        model: asked live, where answers are words or tags.
    """

    name: str
    answers: Tensor | None = field(default=None, repr=False)
    model: Any = field(default=None, repr=False)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Of a model that is asked live, with a tuning or without one."""
        tuned = Tuned.of(self.model)
        return tuned.anatomy if tuned is not None else Anatomy.read(self.model)

    def logits(self, batch: Batch) -> Tensor:
        """Its logits for a batch, without gradient: (rows, classes), or (rows, tokens, classes)."""
        if self.answers is not None:
            rows = torch.from_numpy(batch.rows).to(self.answers.device)
            return self.answers[rows].to(batch.inputs["input_ids"].device)
        # What is said of rows is for tunings: a model without one would not know the argument.
        tuned = hasattr(self.model, "luthier")
        inputs = {n: t for n, t in batch.inputs.items() if tuned or not n.startswith("row_")}
        with torch.no_grad():
            found: Tensor = self.model(**inputs).logits
        return found


def soft_loss(task: Task, wanted: Tensor, result: Result, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(logits / T)), a sum over the targets of `result`.

    The square keeps the size of the gradient where T changes.

    Args:
        wanted: logits of the other model, of the shape of `result.logits`.
    """
    other = told_of(task, Result(result.loss, result.n_targets, wanted, result.labels)).logits
    own = told_of(task, result).logits  # (targets, classes)
    p, q = log_chances(task, other / temperature), log_chances(task, own / temperature)
    each = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)  # (targets,), or (targets, labels)
    return temperature**2 * (each.mean(-1).sum() if task.multi_label else each.sum())

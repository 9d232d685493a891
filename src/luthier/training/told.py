"""The targets of a micro-batch, whatever the task: logits, labels and losses, one for each number in the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.training.objective import Result

__all__ = ["Told", "apart", "log_chances", "told_of"]


@dataclass(frozen=True)
class Told:
    """Targets that carry loss, flat: rows of a labelled task, words or tags of the others.

    Attributes:
        logits: (targets, classes) in fp32; (targets, 1) of a regression.
        labels: (targets,), or (targets, labels) of 0 and 1 where a row may have several.
        losses: their losses, which add up to the task's: (targets,), or (targets, labels) already divided by labels.
    """

    logits: Tensor
    labels: Tensor
    losses: Tensor

    @property
    def chances(self) -> Tensor:
        """What the model gives each wanted answer, with gradient; of the shape of `losses`."""
        several = self.labels.shape[-1] if self.labels.dim() == 2 else 1
        return (-several * self.losses).exp()


def told_of(task: Task, result: Result) -> Told:
    """The targets of a pass whose logits were held."""
    logits, labels = result.logits, result.labels
    assert logits is not None and labels is not None, 'a strategy that looks at logits says so: reads = ("logits",)'
    logits = logits.float()
    if task.name == "regression":
        logits, labels = logits.reshape(-1, 1), labels.float().reshape(-1)
        return Told(logits, labels, F.mse_loss(logits[:, 0], labels, reduction="none"))
    if task.multi_label:
        labels = labels.float()
        losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none") / labels.shape[-1]
        return Told(logits, labels, losses)
    if task.name == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    carries = labels != IGNORED  # (rows * tokens,)
    logits, labels = logits[carries], labels[carries]
    return Told(logits, labels, F.cross_entropy(logits, labels, reduction="none"))


def log_chances(task: Task, logits: Tensor) -> Tensor:
    """Log-probabilities of the classes: (targets, classes).

    Where a row may have several labels each is a question of its own with two answers: (targets, labels, 2).
    """
    if task.multi_label:
        return F.logsigmoid(logits[..., None] * logits.new_tensor([1.0, -1.0]))
    return F.log_softmax(logits, -1)


def apart(task: Task, one: Tensor, other: Tensor) -> Tensor:
    """How far two answers to the same targets lie apart, from their logits (targets, classes): a sum over targets.

    KL(p || q) + KL(q || p) of two distributions; the squared difference of two numbers.
    """
    if task.name == "regression":
        return (one - other).square().sum()
    p, q = log_chances(task, one), log_chances(task, other)
    each = ((p.exp() - q.exp()) * (p - q)).sum(-1)  # (targets,), or (targets, labels)
    return each.mean(-1).sum() if task.multi_label else each.sum()

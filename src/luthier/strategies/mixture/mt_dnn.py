"""Several tasks share the model, each with a head of its own, and each step is of one task.

    logits of a row of task k:  W_k h + b_k        W_k, b_k: the outputs of task k's labels, which no other task moves

The column `--row-task COLUMN` says which task a row is of; labels are called "task: label", also where two tasks have
labels of one name. All rows stand in one file. An epoch has every row once: each task's rows are shuffled and cut into
steps, and the steps of all tasks are shuffled. A head begins as its task's name and the seed say, whatever others there
are, and a step of other tasks leaves it to the bit as it was, decay and momentum included.

Paper: arXiv:1901.11504. A rate of 5e-5 and 5 epochs are quoted for its code. Its head for pairs that reasons in several
turns is the method answer_turns beside yours, `--method lora+answer_turns`: A, GRU and all but the outputs are shared
by the tasks there. Its heads for similarity and for ranking are not here: tasks of texts or pairs with one label each.

Neutral: none; labels are told apart by task, and so is the order.
Claims: tasks of few rows gain from the others, and no task's labels are in the way of another's.
Pitfalls: tasks with more rows have more steps (mtl_sampling weighs further sets, not these). Below the heads all is
shared, also a dense layer that a head brings along (RoBERTa's). A merged or exported model has the outputs of all tasks
side by side: take those of the row's own.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import ConfigError, key
from luthier.data.order import ChosenOrder, Order, shuffled
from luthier.data.sets import Sets
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, is_head
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("mt_dnn", family="mixture", paper="arXiv:1901.11504")
@dataclass(frozen=True, kw_only=True)
class MTDNN(Strategy):
    """A head for each task."""

    example: ClassVar[str] = "sample:minilm-l6 --data ROWS.csv --row-task COLUMN"
    neutral: ClassVar[dict[str, Any] | None] = None
    by_task: ClassVar[bool] = True
    tiny_kind: ClassVar[str] = "bert-tasks"

    def conflicts(self, other: Strategy | Method) -> str | None:
        if other.name == "label_smoothing":
            return "it would give a share of every label to those of other tasks. Leave label_smoothing out."
        return None

    def check(self, spec: RunSpec) -> None:
        if spec.data.row_task is None:
            raise ConfigError(
                "mt_dnn cannot tell which task a row is of: name the column that says so, --row-task COLUMN."
            )

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label or task.template:
            return "its heads are for rows with one label each. Leave it out."
        return None

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        assert usual.tasks is not None
        rows = [np.flatnonzero(usual.tasks == number) for number in range(int(usual.tasks.max()) + 1)]
        steps = sum(-(-len(one) // usual.size) for one in rows)

        @lru_cache(maxsize=2)
        def laid_out(epoch: int) -> list[NDArray[np.int64]]:
            parts = []
            for number, one in enumerate(rows):
                mixed = one[shuffled(len(one), usual.seed, "mt_dnn", number, epoch)]
                parts += [mixed[start : start + usual.size] for start in range(0, len(mixed), usual.size)]
            return [parts[i] for i in shuffled(len(parts), usual.seed, "mt_dnn", epoch)]

        return ChosenOrder(usual, lambda epoch, step: laid_out(epoch)[step], steps)

    def start(self, course: Course) -> None:
        std = float(getattr(course.tuned.model.config, "initializer_range", 0.02))
        for tensor in heads(course).values():
            for labels in course.task.heads:
                name = course.task.labels[labels[0]].partition(": ")[0]
                generator = torch.Generator().manual_seed(key(course.seed, "mt_dnn", name))
                drawn = torch.randn(len(labels), *tensor.shape[1:], generator=generator) * std
                with torch.no_grad():
                    tensor[list(labels)] = (drawn if tensor.dim() > 1 else drawn * 0).to(tensor)

    def before_step(self, course: Course) -> None:
        course.memory.tensors.update({name: p.detach().clone() for name, p in heads(course).items()})

    def after_step(self, course: Course) -> None:
        found = heads(course)
        for labels in course.task.heads:
            rows = list(labels)
            if not any(p.grad is not None and bool(p.grad[rows].any()) for p in found.values()):
                for name, p in found.items():
                    with torch.no_grad():
                        p[rows] = course.memory.tensors[name][rows]


def heads(course: Course) -> dict[str, Tensor]:
    """The trained tensors with a row for each label."""
    n = len(course.task.labels)
    return {name: p for name, p in course.weights().items() if is_head(name) and p.shape[0] == n}

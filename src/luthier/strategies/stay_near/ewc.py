"""Weights that mattered for old rows are made stiff (elastic weight consolidation).

    L + (weight / 2) sum_i F_i (theta_i - theta*_i)^2
    F_i = mean over old rows of (d log p(y | x) / d theta_i)^2            one row at a time, at theta*

theta* are the trained numbers before step 1. y is drawn from the model's own answer (answers = "model": the Fisher
information) or is the row's label ("labels": the empirical one). The old rows are the set `old`.

Paper: arXiv:1612.00796, equation 3.

Neutral: weight = 0.
Cost: one forward and backward pass for each of `rows` old rows before step 1; two copies of what trains. A step of
minilm-l6 with all weights training took 1.18 of a plain one's processor time beside other work (the median of three
rounds), more than the 1.05 that were aimed at: python -m benchmarks --processor --only strategies --case
strategies-full. That was with smaller pieces of the tables; five of them are read or written, see l2_sp.
Claims: two tasks are learnt one after the other with little forgotten.
Pitfalls: start from the model that has learnt the old rows (`luthier merge`): at a fresh head or a LoRA whose B is
zero, F is of numbers that knew nothing, and zero where nothing depends on them. `weight` needs a search, usually from
10 to 1e5; where the first task is learnt to the end F is tiny: on minilm-l6 1e4 and 1e6 kept nothing, 1e8 did. A
language model's answers are not drawn: use answers = "labels".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.core import at_least
from luthier.data.batches import Batch
from luthier.data.order import shuffled
from luthier.data.tasks import Task
from luthier.training.course import Course
from luthier.training.pull import pull
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("ewc", family="stay_near", paper="arXiv:1612.00796")
@dataclass(frozen=True, kw_only=True)
class EWC(Strategy):
    """Elastic weight consolidation."""

    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits",)
    sets: ClassVar[tuple[str, ...]] = ("old",)
    tiny: ClassVar[dict[str, Any]] = {"weight": 1000.0, "answers": "labels", "rows": 6}

    weight: Annotated[float, "of the pull to the old numbers", at_least(0)] = 100.0
    rows: Annotated[int, "old rows that F is the mean of, at most", at_least(1)] = 1000
    answers: Annotated[Literal["model", "labels"], "whose answers F is of"] = "model"

    def suits(self, task: Task) -> str | None:
        if self.answers == "model" and (task.name != "classification" or task.multi_label):
            return 'the model\'s answers are drawn among classes only. Use answers = "labels".'
        return None

    def start(self, course: Course) -> None:
        old = course.rows.rows("old")
        old = old[shuffled(len(old), course.seed, "ewc")[: self.rows]]
        fisher = {name: torch.zeros_like(p) for name, p in course.weights().items()}
        with course.still():
            for row in old:
                for batch in course.cut(old[old == row]):
                    for name, slope in zip(fisher, self._slopes(course, batch), strict=True):
                        if slope is not None:
                            fisher[name] += slope.square() / len(old)
        course.memory.tensors.update({f"fisher {name}": f for name, f in fisher.items()})
        course.memory.tensors.update({f"start {name}": p.detach().clone() for name, p in course.weights().items()})

    def _slopes(self, course: Course, batch: Batch) -> Sequence[Tensor | None]:
        """The gradient of one row's loss, by trained tensor."""
        result = course.forward(batch)
        loss = result.loss
        if self.answers == "model":
            assert result.logits is not None
            chances = result.logits.float().log_softmax(-1)[0]  # (classes,)
            drawn = torch.multinomial(chances.exp().cpu(), 1, generator=course.generator("answer", int(batch.rows[0])))
            loss = -chances[int(drawn)]
        return torch.autograd.grad(loss, [*course.weights().values()], allow_unused=True)

    def penalty(self, course: Course) -> None:
        values = {name: p for name, p in course.weights().items() if p.requires_grad}
        if not self.weight or not values:
            return
        fisher, start = ([course.memory.tensors[f"{what} {name}"] for name in values] for what in ("fisher", "start"))
        course.note("penalty", pull([*values.values()], start, [self.weight] * len(values), fisher))

"""Learn numbers from which a few steps solve each of several tasks.

    for each set i:  phi_i = theta;   `inner` times:  phi_i <- phi_i - inner_lr * grad L_i(phi_i)
    gradient of the step = mean_i (theta - phi_i) / inner_lr

L_i is the mean loss of the step's rows of set i; a set is a task, `--also NAME=FILE` beside the run's own. With one
inner step this is the mean of the tasks' gradients. With plain descent (`--optimiser sgd`) at the rate e * inner_lr it
is the paper's step theta + e * mean_i (phi_i - theta); AdamW may be used with such gradients, as the paper does.

Paper: arXiv:1803.02999. The tasks there are drawn from very many; here all sets are in every step, and the inner steps
of a set are made on the same rows.

Neutral: none; with further rows the run is another one.
Cost: `inner` passes for each set, over its own rows; a copy of what trains and one of the sum.
Claims: a new task of the same kind is learnt in a few steps.
Pitfalls: what it gives is a start, not an end: go on from it on the rows of one task. Few sets make no prior. Scores
are of theta as it stands: nothing is adapted to held-out rows, and an evaluation leaves the run as it was, to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import ConfigError, above, at_least
from luthier.data.batches import Batch
from luthier.data.order import Order
from luthier.data.sets import Sets, equal_shares
from luthier.runs.spec import RunSpec
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("reptile", family="gradient", paper="arXiv:1803.02999")
@dataclass(frozen=True, kw_only=True)
class Reptile(Strategy):
    """First-order meta-learning."""

    neutral: ClassVar[dict[str, Any] | None] = None
    sets: ClassVar[tuple[str, ...]] = ("*",)
    extra_passes: ClassVar[float] = 5.0

    inner: Annotated[int, "steps that are made on each task", at_least(1)] = 3
    inner_lr: Annotated[float, "their rate", above(0)] = 0.01

    def check(self, spec: RunSpec) -> None:
        if spec.precision == "fp16":
            raise ConfigError("reptile moves along gradients, which fp16 scales. Use precision bf16 or fp32.")

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        return equal_shares(usual, sets, "reptile")

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        return course.cut_by_set(batches)

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        named = {name: p for name, p in course.optimiser.named.items() if p.requires_grad}
        start = {name: p.detach().clone() for name, p in named.items()}
        summed = {name: torch.zeros_like(p) for name, p in named.items()}
        numbers = [int(course.rows.numbers(batch.rows)[0]) for batch in batches]
        tasks = sorted(set(numbers))
        losses: list[Tensor] = []
        try:
            for number in tasks:
                mine = [k for k, other in enumerate(numbers) if other == number]
                n_targets = max(1, sum(batches[k].n_targets for k in mine))
                for step in range(self.inner):
                    for k in mine:
                        part = loss(k + step * len(batches), batches[k]) / n_targets
                        torch.autograd.backward(part)
                        if step == 0:  # at theta, where a plain run has its loss too
                            losses.append(part.detach() / len(tasks))
                    self._descend(course, summed, last=step + 1 == self.inner)
                _put(course, start)
        finally:
            course.optimiser.zero_grad()
            _put(course, start)
        for name, total in summed.items():
            course.optimiser.named[name].grad = total / len(tasks)
        return losses

    @torch.no_grad()
    def _descend(self, course: Course, summed: dict[str, Tensor], *, last: bool) -> None:
        """One inner step; what it moves by is added up. The last one's move itself is of no use."""
        course.tuned.state.mask_gradients()
        for name, total in summed.items():
            slope = course.optimiser.named[name].grad
            if slope is not None:
                total += slope  # theta - phi is inner_lr times the sum of the inner gradients
                if not last:
                    course.optimiser.named[name].sub_(self.inner_lr * slope)
        course.optimiser.zero_grad()


@torch.no_grad()
def _put(course: Course, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        course.optimiser.named[name].copy_(value)

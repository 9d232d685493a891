"""Learn numbers that are good after a few steps on a task's support rows, judged by its other rows (MAML).

    for each set i:  phi = theta;   `inner` times:  phi <- phi - inner_lr * grad L_i,support(phi)
    gradient of the step = mean_i  d L_i,query(phi_i) / d theta

A set is a task, `--also NAME=FILE` beside the run's own. In each step half of a set's rows, by a draw, is its support,
the rest its query. `derivative = "second"` differentiates through the inner steps: each is gone through once more, from
the last to the first, v <- v - inner_lr * H v with the Hessian H of the support loss there, so one graph at a time is
held however many steps there are. `derivative = "first"` takes the query's gradient at phi as it is (FOMAML).
`adapts = "head"` moves the head alone inside (ANIL).

Paper: arXiv:1703.03400, algorithm 1, which adds tasks up; here they are averaged, as rows are. Tasks there are drawn
from very many; here all sets are in every step.

Neutral: none; with further rows the run is another one.
Cost: `inner` passes over the support rows and one over the query rows of each set; a copy of what trains for each task
and, with derivative = "second", one for each inner step, and a pass of about twice the time for each.
Claims: a new task of the same kind is learnt in a few steps.
Pitfalls: what it gives is a start, not an end: go on from it on the rows of one task. Few sets make no prior. Adaptive
steps on a new task are not those that were trained for: plain descent at inner_lr is.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from luthier import kernels
from luthier.core import ConfigError, above, at_least
from luthier.data.batches import Batch
from luthier.data.order import Order
from luthier.data.sets import Sets, equal_shares
from luthier.runs.spec import RunSpec
from luthier.surgery import is_head
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy

Values = dict[str, Tensor]
Parts = list[tuple[int, Batch]]  # with its place in the step


@STRATEGIES.register("maml", family="gradient", paper="arXiv:1703.03400")
@dataclass(frozen=True, kw_only=True)
class MAML(Strategy):
    """Model-agnostic meta-learning."""

    neutral: ClassVar[dict[str, Any] | None] = None
    sets: ClassVar[tuple[str, ...]] = ("*",)
    extra_passes: ClassVar[float] = 3.0

    inner: Annotated[int, "steps on the support rows; 0, plain training on the query rows", at_least(0)] = 1
    inner_lr: Annotated[float, "their rate", above(0)] = 0.01
    derivative: Annotated[Literal["first", "second"], "whether the inner steps themselves are differentiated"] = "first"
    adapts: Annotated[Literal["all", "head"], "what the inner steps move"] = "all"

    def check(self, spec: RunSpec) -> None:
        if spec.precision == "fp16":
            raise ConfigError("maml moves along gradients, which fp16 scales. Use precision bf16 or fp32.")

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        if usual.size < 2 * len(sets.names):
            raise ConfigError(
                f"batch.size {usual.size}: maml needs a support and a query row of each of {len(sets.names)} sets in a "
                f"step. Use batch.size = {2 * len(sets.names)} or more."
            )
        return equal_shares(usual, sets, "maml")

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        tasks = _tasks(course, np.concatenate([batch.rows for batch in batches]))
        return [piece for halves in tasks for rows in halves for piece in course.cut(rows)]

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        tasks = _tasks(course, np.concatenate([batch.rows for batch in batches]))
        named = {name: p for name, p in course.optimiser.named.items() if p.requires_grad}
        moved = [name for name in named if self.adapts == "all" or is_head(name)]
        start = {name: p.detach().clone() for name, p in named.items()}
        summed = {name: torch.zeros_like(p) for name, p in named.items()}
        losses = [torch.zeros((), device=course.device) for _ in batches]
        try:
            for halves in tasks:
                support, query = (
                    [(k, b) for k, b in enumerate(batches) if b.rows[0] in set(rows.tolist())] for rows in halves
                )
                path: list[Values] = []
                for step in range(self.inner):
                    path.append({name: named[name].detach().clone() for name in moved})
                    slopes = self._slopes(course, support, loss, step * len(batches), losses, 0.0)
                    _put(course, {name: path[-1][name] - self.inner_lr * slopes[name] for name in moved})
                v = self._slopes(course, query, loss, self.inner * len(batches), losses, 1 / len(tasks))
                for step in reversed(range(self.inner if self.derivative == "second" else 0)):
                    _put(course, path[step])
                    v = self._through(course, support, loss, step * len(batches), v, moved)
                for name, total in summed.items():
                    total += v[name] / len(tasks)
                _put(course, start)
        finally:
            course.optimiser.zero_grad()
            _put(course, start)
        for name, total in summed.items():
            course.optimiser.named[name].grad = total
        return losses

    def _slopes(
        self, course: Course, parts: Parts, loss: Callable[[int, Batch], Tensor], shift: int,
        losses: list[Tensor], share: float,
    ) -> Values:  # fmt: skip
        """The gradient of the mean loss of some pieces where the weights are; their losses are noted in `share`."""
        n_targets = max(1, sum(batch.n_targets for _, batch in parts))
        for k, batch in parts:
            part = loss(k + shift, batch) / n_targets
            torch.autograd.backward(part)
            losses[k] = losses[k] + share * part.detach()  # also by zero: what is not finite stays so
        return _taken(course)

    def _through(
        self, course: Course, parts: Parts, loss: Callable[[int, Batch], Tensor], shift: int, v: Values,
        moved: list[str],
    ) -> Values:  # fmt: skip
        """v - inner_lr H v, H the Hessian of the support loss where the weights are."""
        named = {name: course.optimiser.named[name] for name in v}
        n_targets = max(1, sum(batch.n_targets for _, batch in parts))
        along = _masked(course, {name: v[name] for name in moved})
        found = dict(v)
        with ExitStack() as stack:
            stack.enter_context(kernels.plain())  # fast kernels have no second derivative
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for k, batch in parts:
                part = loss(k + shift, batch) / n_targets
                slopes = torch.autograd.grad(part, list(named.values()), create_graph=True, allow_unused=True)
                by_name = {n: g for n, g in zip(named, slopes, strict=True) if g is not None and g.requires_grad}
                product = sum(((by_name[n] * along[n]).sum() for n in moved if n in by_name), start=torch.zeros(()))
                if not product.requires_grad:
                    continue
                turned = torch.autograd.grad(product, list(named.values()), allow_unused=True)
                for name, more in zip(named, turned, strict=True):
                    if more is not None:
                        found[name] = found[name] - self.inner_lr * more
        return found


def _tasks(course: Course, rows: NDArray[np.int64]) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Support and query rows of each set, by a draw that does not depend on how the step was cut."""
    rows = np.unique(rows)
    numbers = course.rows.numbers(rows)
    found = []
    for number in np.unique(numbers):
        own = rows[numbers == number]
        drawn = own[torch.randperm(len(own), generator=course.generator("support", int(number))).numpy()]
        found.append((np.sort(drawn[: len(own) // 2]), np.sort(drawn[len(own) // 2 :])))
    return found


def _taken(course: Course) -> Values:
    """The gradients that are there, masked as an update would be; afterwards there are none."""
    course.tuned.state.mask_gradients()
    learning = {n: p for n, p in course.optimiser.named.items() if p.requires_grad}
    found = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in learning.items()}
    course.optimiser.zero_grad()
    return found


def _masked(course: Course, values: Values) -> Values:
    for name, value in values.items():
        course.optimiser.named[name].grad = value.clone()
    found = _taken(course)
    return {name: found[name] for name in values}


@torch.no_grad()
def _put(course: Course, values: Values) -> None:
    for name, value in values.items():
        course.optimiser.named[name].copy_(value)

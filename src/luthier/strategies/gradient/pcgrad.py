"""Gradients of several sets of rows, each without the part that works against another (gradient surgery).

    g_i = grad L_i                                          L_i: mean loss of the step's rows of set i
    for j in random order:  if v_i . g_j < 0:  v_i <- v_i - (v_i . g_j) / ||g_j||^2 g_j          v_i = g_i at first
    g = sum_i v_i

g_j is always the gradient as it was. Products are over all trained numbers but those of the head, whose gradients are
added up as they are. Each step holds the same number of rows of each set, `--also NAME=FILE` beside the run's own; an
epoch is one pass over the run's own rows.

Paper: arXiv:2001.06782, algorithm 1, which adds the gradients up. An average would divide the rate by their number.

Neutral: none; with further rows the run is another one.
Cost: as many passes as there are sets, each over its own rows: no more rows in all. A copy of the gradient a set.
Claims: several tasks are learnt together with less loss where their gradients conflict.
Pitfalls: the gradient is as long as that of all sets together; a rate that was found for one set is high for four.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from luthier.core import ConfigError
from luthier.data.batches import Batch
from luthier.data.order import Order
from luthier.data.sets import Sets, equal_shares
from luthier.runs.spec import RunSpec
from luthier.surgery import is_head
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy

Slopes = dict[str, Tensor]


@STRATEGIES.register("pcgrad", family="gradient", paper="arXiv:2001.06782")
@dataclass(frozen=True, kw_only=True)
class PCGrad(Strategy):
    """Projected conflicting gradients."""

    neutral: ClassVar[dict[str, Any] | None] = None
    sets: ClassVar[tuple[str, ...]] = ("*",)
    extra_passes: ClassVar[float] = 1.0

    def check(self, spec: RunSpec) -> None:
        if spec.precision == "fp16":
            raise ConfigError("pcgrad compares gradients, which fp16 scales. Use precision bf16 or fp32.")

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        return equal_shares(usual, sets, "pcgrad")

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        return course.cut_by_set(batches)

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        numbers = [int(course.rows.numbers(batch.rows)[0]) for batch in batches]
        slopes: list[Slopes] = []
        losses: list[Tensor] = []
        for number in sorted(set(numbers)):
            mine = [k for k, other in enumerate(numbers) if other == number]
            n_targets = max(1, sum(batches[k].n_targets for k in mine))
            for k in mine:
                part = loss(k, batches[k]) / n_targets
                torch.autograd.backward(part)
                losses.append(part.detach())
            slopes.append({name: p.grad for name, p in course.optimiser.named.items() if p.grad is not None})
            course.optimiser.zero_grad()
        for summed in (added(projected(slopes, course.generator())), added([_heads(one) for one in slopes])):
            for name, slope in summed.items():
                course.optimiser.named[name].grad = slope
        return losses


def projected(slopes: list[Slopes], generator: torch.Generator) -> list[Slopes]:
    """The gradients of the sets without their heads, each freed of what works against another as it was."""
    shared = [{n: g for n, g in one.items() if not is_head(n)} for one in slopes]
    found = []
    for i, own in enumerate(shared):
        freed = dict(own)
        for j in torch.randperm(len(shared), generator=generator).tolist():
            along = _product(freed, shared[j])
            if j != i and along < 0:
                share = along / _product(shared[j], shared[j])
                freed |= {n: freed.get(n, torch.zeros_like(g)) - share * g for n, g in shared[j].items()}
        found.append(freed)
    return found


def added(slopes: list[Slopes]) -> Slopes:
    """The sum, tensor by tensor."""
    found: Slopes = {}
    for one in slopes:
        for name, slope in one.items():
            found[name] = found[name] + slope if name in found else slope
    return found


def _heads(slopes: Slopes) -> Slopes:
    return {name: slope for name, slope in slopes.items() if is_head(name)}


def _product(one: Slopes, other: Slopes) -> float:
    # In one order: a sum of floats depends on it.
    return sum(float((slope.float() * other[n].float()).sum()) for n, slope in one.items() if n in other)

"""Learn or track how much the loss of each set of rows should count.

    uncertainty   sum_i  exp(-s_i) L_i + s_i / 2                        s_i learnt; a regression: exp(-s_i) L_i / 2
    dwa           sum_i  w_i L_i,   w = M softmax(r / T),   r_i = L_i(e-1) / L_i(e-2)      of the epochs before
    gradnorm      sum_i  w_i L_i,   w moved so that w_i ||grad L_i|| nears  mean_j(w_j ||grad L_j||) r_i^a,
                                    r_i = (L_i / L_i at step 1) over its mean;   sum_i w_i = M

L_i is the mean loss of the step's rows of set i, `--also NAME=FILE` beside the run's own; each step holds the same
number of rows of each, and an epoch is one pass over the run's own rows. s_i starts at 0 and every w_i at 1. The log
holds each set's loss and weight. s_i learns at the run's rate, without decay.

Paper: arXiv:1705.07115 (uncertainty); dwa is arXiv:1803.10704, gradnorm arXiv:1711.02257. Its gradients are those of
the last shared layer; here they are of all that trains but the head. Its weights move at `weights_lr`, by descent;
that rate's default is ours.

Neutral: none; with further rows the run is another one.
Cost: as many passes as there are sets, each over its own rows: no more rows in all. gradnorm: a copy of the gradient a
set.
Claims: several tasks are learnt together without weights that are searched for.
Pitfalls: losses are added up, not averaged: a rate that was found for one set is high for four. An uncertain set is
counted less, also where it is the one that matters.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.core import ConfigError, above
from luthier.data.batches import Batch
from luthier.data.order import Order
from luthier.data.sets import Sets, equal_shares
from luthier.runs.spec import RunSpec
from luthier.surgery import is_head
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("loss_weighting", family="mixture", paper="arXiv:1705.07115")
@dataclass(frozen=True, kw_only=True)
class LossWeighting(Strategy):
    """Weights of several losses."""

    neutral: ClassVar[dict[str, Any] | None] = None
    sets: ClassVar[tuple[str, ...]] = ("*",)
    extra_passes: ClassVar[float] = 1.0

    form: Annotated[Literal["uncertainty", "dwa", "gradnorm"], "what the weights follow"] = "uncertainty"
    temperature: Annotated[float, "of dwa: higher, more equal", above(0)] = 2.0
    power: Annotated[float, "a of gradnorm: higher, slower sets are pulled harder", above(0)] = 1.5
    weights_lr: Annotated[float, "rate of gradnorm's weights", above(0)] = 0.025

    def check(self, spec: RunSpec) -> None:
        if spec.precision == "fp16":
            raise ConfigError("loss_weighting compares losses and gradients, which fp16 scales. Use bf16 or fp32.")

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        return equal_shares(usual, sets, "loss_weighting")

    def numbers(self, course: Course) -> dict[str, Tensor]:
        return {"s": torch.zeros(len(course.rows.names))} if self.form == "uncertainty" else {}

    def start(self, course: Course) -> None:
        n = len(course.rows.names)
        course.memory.facts.update(
            {"weights": [1.0] * n, "first": [], "epoch": 0, "sums": [0.0] * n, "steps": 0, "means": []}
        )

    def before_step(self, course: Course) -> None:
        facts = course.memory.facts
        if self.form != "dwa" or facts["epoch"] == course.epoch or not facts["steps"]:
            return
        means = [*facts["means"][-1:], [total / facts["steps"] for total in facts["sums"]]]
        if len(means) == 2:
            facts["weights"] = averaged(means[1], means[0], self.temperature)
        facts.update({"means": means, "epoch": course.epoch, "sums": [0.0] * len(facts["sums"]), "steps": 0})

    def batches(self, course: Course, batches: list[Batch]) -> list[Batch]:
        return course.cut_by_set(batches)

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        numbers = [int(course.rows.numbers(batch.rows)[0]) for batch in batches]
        summed: dict[str, Tensor] = {}
        losses: list[Tensor] = []
        for number in sorted(set(numbers)):
            mine = [k for k, other in enumerate(numbers) if other == number]
            n_targets, total = max(1, sum(batches[k].n_targets for k in mine)), 0.0
            weight = self._weight(course, number)
            for k in mine:
                part = loss(k, batches[k]) / n_targets
                torch.autograd.backward(weight() * part)
                losses.append(part.detach())
                total += float(part.detach())
            if self.form == "uncertainty":
                torch.autograd.backward(course.numbers["s"][number] / 2)
            elif self.form == "gradnorm":
                _set_aside(course, number, summed)
            course.note(f"loss.{course.rows.names[number]}", total)
            course.note(f"weight.{course.rows.names[number]}", float(weight().detach()))
        for name, slope in summed.items():
            course.optimiser.named[name].grad = slope
        return losses

    def _weight(self, course: Course, number: int) -> Callable[[], Tensor]:
        if self.form == "uncertainty":
            share = 0.5 if course.task.name == "regression" else 1.0
            return lambda: share * torch.exp(-course.numbers["s"][number])
        return lambda: torch.tensor(course.memory.facts["weights"][number], device=course.device)

    def after_step(self, course: Course) -> None:
        facts, noted = course.memory.facts, course.progress.numbers
        found = [noted.get(f"loss_weighting.loss.{name}", 0.0) for name in course.rows.names]
        facts["sums"] = [a + b for a, b in zip(facts["sums"], found, strict=True)]
        facts["steps"] += 1
        if self.form != "gradnorm":
            return
        facts["first"] = facts["first"] or found
        norms = [noted.get(f"loss_weighting.norm.{name}", 0.0) for name in course.rows.names]
        facts["weights"] = balanced(facts["weights"], norms, found, facts["first"], self.power, self.weights_lr)


def averaged(before: list[float], earlier: list[float], temperature: float) -> list[float]:
    """Weights from the mean losses of two epochs: M softmax(before / earlier / T)."""
    ratio = _positive(before) / _positive(earlier)
    return [len(before) * w for w in torch.softmax(ratio / temperature, 0).tolist()]


def balanced(
    weights: list[float], norms: list[float], losses: list[float], first: list[float], power: float, rate: float
) -> list[float]:
    """Weights after one step down  sum_i | w_i n_i - mean(w n) r_i^a |,  whose aims are held fixed."""
    w, n = torch.tensor(weights, dtype=torch.float64), torch.tensor(norms, dtype=torch.float64)
    fallen = _positive(losses) / _positive(first)
    aim = (w * n).mean() * (fallen / fallen.mean()) ** power
    moved = (w - rate * torch.sign(w * n - aim) * n).clamp(min=1e-6)
    return [float(x) for x in len(weights) * moved / moved.sum()]


def _positive(losses: list[float]) -> Tensor:
    """Losses to divide by: rows that are known by heart have one of exactly 0."""
    return torch.tensor(losses, dtype=torch.float64).clamp(min=1e-6)


def _set_aside(course: Course, number: int, summed: dict[str, Tensor]) -> None:
    """Add up one set's gradient, which carries its weight, and note its norm without it; nothing is left in place."""
    weight, square = course.memory.facts["weights"][number], 0.0
    for name, p in course.optimiser.named.items():
        if p.grad is not None:
            square += 0.0 if is_head(name) else float(p.grad.float().square().sum())
            summed[name] = summed[name] + p.grad if name in summed else p.grad
    course.optimiser.zero_grad()
    course.note(f"norm.{course.rows.names[number]}", square**0.5 / weight)

"""Learn from forward passes alone, along random directions that only their seeds remember (MeZO).

    g = (L(theta + eps z) - L(theta - eps z)) / (2 eps)          z ~ N(0, I), named by seed, step and tensor
    theta <- theta - rate * (g z + decay * theta)

L is the mean loss of the step's rows, without dropout. With `seeds` > 1 several directions are tried and their g z are
averaged. `aim = "errors"` takes the share of wrong answers in place of the loss, through which no gradient would go.

The log holds g as `mezo.slope` (of the last seed, before the clip). `--clip` bounds |g|, whose size is that of the
gradient on average; the paper's code clips nothing: `--clip 0`. `--lr` has to be given: the paper's rates are 1e-7 to
1e-6 for all numbers of a large model at eps 1e-3, 5e-5 to 1e-4 for LoRA at 1e-2, 1e-3 to 1e-2 for prefixes at 1e-1, at
a constant schedule (`--schedule constant`).

Paper: arXiv:2305.17333, algorithm 1. Draws differ from those of its code: each tensor has its own.

Neutral: none; it moves otherwise than by gradients.
Cost: two forward passes for each seed, no backward one. No gradient, no activations kept, no state: the memory of
inference and one draw as large as the largest tensor.
Claims: full fine-tuning of a model of which only inference fits.
Pitfalls: 10 to 100 times more steps. The loss needs a prompt and words of the model's own: with a new head it learns
next to nothing. Three moves a step leave each number off by rounding; in bf16 that is felt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from luthier.core import above, at_least, key
from luthier.data.batches import Batch
from luthier.data.tasks import Task
from luthier.runs.spec import OptimSpec
from luthier.surgery import Group, Method
from luthier.training.course import Course
from luthier.training.optimiser import Optimiser
from luthier.training.seeded_descent import SeededDescent
from luthier.training.strategy import STRATEGIES, Strategy, fills


@STRATEGIES.register("mezo", family="gradient", paper="arXiv:2305.17333")
@dataclass(frozen=True, kw_only=True)
class MeZO(Strategy):
    """Memory-efficient zeroth-order descent."""

    neutral: ClassVar[dict[str, Any] | None] = None
    extra_passes: ClassVar[float] = -1.0
    extra_forwards: ClassVar[float] = 2.0

    eps: Annotated[float, "how far the weights are moved to either side", above(0)] = 1e-3
    seeds: Annotated[int, "directions tried in a step", at_least(1)] = 1
    aim: Annotated[Literal["loss", "errors"], "what is to fall: the loss, or the share of wrong answers"] = "loss"

    def conflicts(self, other: Strategy | Method) -> str | None:
        if self.aim == "errors" and isinstance(other, Strategy) and (fills(other, "loss") or fills(other, "weigh")):
            return f"{other.name} changes the loss, and wrong answers are counted without one. Use mezo.aim = loss."
        return None

    def suits(self, task: Task) -> str | None:
        counted = task.name == "classification" and not task.multi_label
        return "wrong answers are counted where a row has one label. Use aim = loss." * (
            self.aim == "errors" and not counted
        )

    def optimiser(self, named: dict[str, nn.Parameter], groups: list[Group], spec: OptimSpec, lr: float) -> Optimiser:
        return SeededDescent(named, groups, spec, lr)

    def gradient(self, course: Course, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[Tensor]:
        optimiser = course.optimiser
        assert isinstance(optimiser, SeededDescent)
        n_targets = max(1, sum(batch.n_targets for batch in batches))
        eps = 0.0 if course.trying else self.eps
        found = []
        with torch.no_grad(), course.still():
            for number in range(self.seeds):
                seed, at = key(course.seed, "mezo", course.step, number), 0.0
                sides = []
                try:
                    for to in (eps, -eps):
                        _shift(course, optimiser, seed, to - at)
                        at = to
                        sides.append(torch.stack([self._aimed(course, loss, *one) for one in enumerate(batches)]))
                finally:
                    _shift(course, optimiser, seed, -at)
                above_, below = (side.double() / n_targets for side in sides)
                optimiser.slopes.append((seed, float((above_ - below).sum()) / (2 * self.eps)))
                found.append((above_ + below) / 2)
        course.note("slope", optimiser.slopes[-1][1])
        return list(torch.stack(found).mean(0))

    def _aimed(self, course: Course, loss: Callable[[int, Batch], Tensor], index: int, batch: Batch) -> Tensor:
        if self.aim == "loss":
            return loss(index, batch).float()
        result = course.forward(batch)
        assert result.logits is not None and result.labels is not None
        return result.logits.argmax(-1).ne(result.labels).float().sum()


def _shift(course: Course, optimiser: SeededDescent, seed: int, by: float) -> None:
    if by:
        optimiser.shift(seed, by)
        course.tuned.state.constrain()  # what a method masks stays where it is

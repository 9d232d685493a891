"""Lower blocks stop learning once their gradients have settled.

    G_b: the norms of block b's gradient, added up over an interval of steps
    change_b = |G_b(before) - G_b| / G_b(before)
    after each interval the longest run of lowest blocks rests whose change lies below the q-th percentile of all

What rests never learns again. The head is no block. Whatever trains below the first block counts as the lowest one.

Paper: arXiv:2102.01386 (AutoFreeze), whose interval and percentile were not checked: ours are choices.

Neutral: percent = 0.
Cost: less and less: backward passes end above what rests.
Claims: faster fine-tuning at nearly the same score.
Pitfalls: gradients settle for another reason too, a rate that has fallen to nothing. Features of what rests are
computed anew each time.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from luthier.core import at_least, between
from luthier.surgery.layer_groups import layer_groups
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("adaptive_freeze", family="pace", paper="arXiv:2102.01386")
@dataclass(frozen=True, kw_only=True)
class AdaptiveFreeze(Strategy):
    """Freezing of settled lower blocks."""

    neutral: ClassVar[dict[str, Any] | None] = {"percent": 0.0}
    tiny: ClassVar[dict[str, Any]] = {"every": 1, "percent": 80.0}

    percent: Annotated[float, "q, percentile of the changes below which a block has settled", between(0, 100)] = 50.0
    every: Annotated[int, "steps of an interval", at_least(1)] = 50

    def start(self, course: Course) -> None:
        n = len(self._blocks(course))
        course.memory.facts.update({"resting": 0, "now": [0.0] * n, "sum": [0.0] * n, "before": None})

    def trains(self, course: Course) -> Collection[str] | None:
        asleep = {name for group in self._blocks(course)[: course.memory.facts["resting"]] for name in group}
        course.note("resting", course.memory.facts["resting"])
        return [name for name in course.weights() if name not in asleep]

    def after_backward(self, course: Course) -> None:
        # Of this step alone: made again, the same is written.
        course.memory.facts["now"] = [self._norm(course, group) for group in self._blocks(course)]

    def after_step(self, course: Course) -> None:
        facts = course.memory.facts
        facts["sum"] = [a + b for a, b in zip(facts["sum"], facts["now"], strict=True)]
        if course.step % self.every:
            return
        if facts["before"] is not None:
            facts["resting"] = self.settled(facts["before"], facts["sum"], facts["resting"])
        facts["before"], facts["sum"] = facts["sum"], [0.0] * len(facts["sum"])

    def settled(self, before: list[float], now: list[float], resting: int) -> int:
        """How many of the lowest blocks rest from now on; the last one always learns."""
        changes = [abs(b - n) / max(b, 1e-30) for b, n in zip(before[resting:], now[resting:], strict=True)]
        if not changes:
            return resting
        bound = float(torch.quantile(torch.tensor(changes, dtype=torch.float64), self.percent / 100))
        run = next((i for i, change in enumerate(changes) if not change < bound), len(changes))
        return min(resting + run, len(now) - 1)

    def _blocks(self, course: Course) -> list[list[str]]:
        """Names by block, from the lowest up."""
        return [group for group in reversed(layer_groups(course.tuned, list(course.weights()))[1:]) if group]

    def _norm(self, course: Course, names: list[str]) -> float:
        grads = [g for name in names if (g := course.weights()[name].grad) is not None]
        return float(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))) if grads else 0.0

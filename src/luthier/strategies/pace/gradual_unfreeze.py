"""The top of the model learns first, and with every epoch the next group below it joins in.

    1 + at_once * (1 + floor(t / every)) groups learn            counted from the top; t: epochs, or steps

Group 0 is the head, then come the blocks from the last to the first, last of all the embeddings. Groups in which
nothing trains, as above an adapter in a language model, are not counted.

Paper: arXiv:1801.06146 (gradual unfreezing).

Neutral: at_once = 1000000, which lets everything learn from the start.
Cost: less than a plain step while lower groups rest: backward passes end above them.
Claims: less is forgotten than when all layers learn at once.
Pitfalls: a run of few epochs ends before the lowest groups have joined: count them, or give `every` in steps. The rate
has fallen by then: on a line, group g gets (1 - g every / steps)^2 of what it would have had; with every = 12 of 120
steps that is 0.49 three blocks down, 0.09 for the embeddings. So it wants a larger rate than the plain run: 96 rows of
trec6, all weights of minilm-l6, 120 steps, one seed: at 5e-5 0.630, the plain run 0.740; at 2e-4 0.807, the plain run
0.757 (`python -m experiments.strategies --only gradual_unfreeze`, whose scene has 5e-5). llrd and stlr beside it are
the recipe of the paper.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import at_least
from luthier.surgery.layer_groups import layer_groups
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("gradual_unfreeze", family="pace", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class GradualUnfreeze(Strategy):
    """Top-down unfreezing."""

    neutral: ClassVar[dict[str, Any] | None] = {"at_once": 1_000_000}

    every: Annotated[int, "steps from one group to the next; 0, an epoch", at_least(0)] = 0
    at_once: Annotated[int, "groups that join each time", at_least(1)] = 1
    head_first: Annotated[bool, "the head learns alone at first"] = False

    def trains(self, course: Course) -> Collection[str] | None:
        groups = [group for group in layer_groups(course.tuned, list(course.weights())) if group]
        times = (course.step - 1) // self.every if self.every else course.epoch
        joined = groups[: 1 + self.at_once * (times + (not self.head_first))]
        course.note("groups", len(joined))
        return [name for group in joined for name in group]

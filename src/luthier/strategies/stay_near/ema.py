"""A moving average of the weights is scored and kept; training goes on with the weights themselves.

    w~ <- d * w~ + (1 - d) * w       after each step,       d = min(decay, (1 + t) / (10 + t)),   t steps made

The average begins at the weights before step 1, and its decay grows, so that a short run does not keep its start.

Paper: Polyak & Juditsky 1992, "Acceleration of Stochastic Approximation by Averaging", in its exponential form.

Neutral: decay = 0.
Cost: a copy of what trains.
Claims: less noise of the last steps in what is kept. Of a rate that falls to nothing, as by default, there is little
left to take away: use it with schedule = "constant", or with many steps at a high rate.
Pitfalls: after few steps the average lags behind. Scores inside the run are of the average too.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import between
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("ema", family="stay_near", paper="Polyak & Juditsky 1992")
@dataclass(frozen=True, kw_only=True)
class EMA(Strategy):
    """Exponential moving average of what trains."""

    neutral: ClassVar[dict[str, Any] | None] = {"decay": 0.0}
    shortcut: ClassVar[str] = "decay"

    decay: Annotated[float, "share of the average that each step leaves, at most", between(0, 0.999999)] = 0.999

    def start(self, course: Course) -> None:
        course.memory.tensors.update({name: p.detach().clone() for name, p in course.weights().items()})

    @torch.no_grad()
    def after_step(self, course: Course) -> None:
        share = min(self.decay, (1 + course.step) / (10 + course.step))
        for name, parameter in course.weights().items():
            course.memory.tensors[name].lerp_(parameter, 1 - share)

    def kept(self, course: Course) -> Mapping[str, Tensor]:
        return course.memory.tensors

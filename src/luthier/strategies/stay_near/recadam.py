"""First stay at the start, then learn the task: Adam's step grows in while a pull to the start fades out.

    s(t) = 1 / (1 + exp(-k (t - t0)))
    w <- w - rate * s(t) * adam;   w <- w - rate * (1 - s(t)) * gamma * (w - w0)

The new head has no past and learns by plain AdamW. w0 is what a trained number was before step 1, which beside an
adapter that starts at nothing is the base model.

Paper: arXiv:2004.12651; the update is that of the authors' code.

Neutral: t0 = -1000000.
Cost: a copy of what trains, and another while a step is made.
Claims: better and more even GLUE scores than plain fine-tuning, most with little data. The authors' code searches k
from .05 to 1 and t0 from 100 to 1000 for BERT-base, at gamma = 5000 and rates near 2e-5.
Pitfalls: rate * gamma must stay below 1, or the pull leaps over the start: rates of adapters need a small gamma. In a
run shorter than t0 little is learnt. Weight decay pulls another way and is refused beside it.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from luthier.core import ConfigError, above, at_least
from luthier.runs.spec import RunSpec
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("recadam", family="stay_near", paper="arXiv:2004.12651")
@dataclass(frozen=True, kw_only=True)
class RecAdam(Strategy):
    """Recall and learn."""

    neutral: ClassVar[dict[str, Any] | None] = {"t0": -1_000_000}
    tiny: ClassVar[dict[str, Any]] = {"t0": 2, "k": 1.0, "gamma": 100.0}

    gamma: Annotated[float, "pull towards the start", at_least(0)] = 5000.0
    k: Annotated[float, "how quickly learning takes over", above(0)] = 0.1
    t0: Annotated[int, "the step at which half of each acts"] = 250

    def check(self, spec: RunSpec) -> None:
        if spec.optim.weight_decay > 0 or spec.optim.name != "adamw":
            raise ConfigError(
                "recadam is AdamW with a pull towards the start: it needs optim.name = adamw and weight_decay = 0."
            )
        self._refuse_leaps(spec.optim.lr or 0.0)

    def _refuse_leaps(self, rate: float) -> None:
        if rate * self.gamma >= 1 and self.t0 > 0:
            raise ConfigError(
                f"recadam.gamma: {self.gamma:g} times the rate {rate:g} is {rate * self.gamma:.3g}, and from 1 on the "
                f"pull leaps over the start. Use gamma below {1 / rate:g}, or a lower --lr."
            )

    def start(self, course: Course) -> None:
        for name, weight in course.weights(head=False).items():
            self._refuse_leaps(course.optimiser.rate_of(name, 1.0))
            course.memory.tensors[name] = weight.detach().clone()

    def before_step(self, course: Course) -> None:
        for name, weight in course.weights(head=False).items():
            course.memory.tensors[f"before {name}"] = weight.detach().clone()

    @torch.no_grad()
    def after_step(self, course: Course) -> None:
        learns = self.share(course.step)
        course.note("learns", learns)
        for name, weight in course.weights(head=False).items():
            before = course.memory.tensors.pop(f"before {name}")
            if not weight.requires_grad:
                continue  # it rests in this step
            weight.copy_(torch.lerp(before, weight, learns))
            pull = course.rate_of(name) * (1 - learns) * self.gamma
            weight.sub_(weight - course.memory.tensors[name], alpha=pull)

    def share(self, step: int) -> float:
        """How much of the step learns."""
        return 1 / (1 + math.exp(min(700.0, -self.k * (step - self.t0))))

"""Decay towards the weights at the start, not towards zero; the new head, which has no past, decays to zero.

    L + alpha / 2 * ||w - w0||^2 + beta / 2 * ||w_head||^2               form = "coupled": added to the loss
    w <- w - rate * alpha * (w - w0),   w_head <- (1 - rate * beta) w_head    form = "decoupled": beside the update

w0 is what a trained number was before step 1. Beside an adapter that starts at nothing this is decay to the base model.

Paper: arXiv:1802.01483 (L2-SP), in its coupled form.

Neutral: alpha = 0, beta = 0.
Cost: a copy of what trains, and a pass over it, the weights and the gradients. A step of minilm-l6 with all weights
training took 1.12 of a plain one's processor time beside other work (the median of three rounds), more than the 1.05
that were aimed at: python -m benchmarks --processor --only strategies --case strategies-full. That was with pieces of
half a megabyte, now two. The pass reads or writes four tables of the model's size, AdamW's update seven.
Claims: better transfer than decay to zero in image recognition with little data; its weights were quoted as alpha = .1
and beta = .01 there. For texts search alpha between .001 and 1.
Pitfalls: under AdamW the coupled form is rescaled with the gradient, tensor by tensor; "decoupled" is not. Weight decay
pulls another way and is refused beside it.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch

from luthier.core import ConfigError, at_least
from luthier.runs.spec import RunSpec
from luthier.surgery import is_head
from luthier.training.course import Course
from luthier.training.pull import pull
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("l2_sp", family="stay_near", paper="arXiv:1802.01483")
@dataclass(frozen=True, kw_only=True)
class L2SP(Strategy):
    """Starting-point regularisation."""

    neutral: ClassVar[dict[str, Any] | None] = {"alpha": 0.0, "beta": 0.0}

    alpha: Annotated[float, "pull towards the start", at_least(0)] = 0.1
    beta: Annotated[float, "pull of a new head towards zero", at_least(0)] = 0.01
    form: Annotated[Literal["coupled", "decoupled"], "a penalty in the loss, or a pull beside the update"] = "coupled"

    def check(self, spec: RunSpec) -> None:
        if spec.optim.weight_decay > 0:
            raise ConfigError(
                f"l2_sp pulls towards the start, and optim.weight_decay = {spec.optim.weight_decay:g} towards zero. "
                "Set weight_decay = 0."
            )

    def start(self, course: Course) -> None:
        course.memory.tensors.update({n: p.detach().clone() for n, p in course.weights(head=False).items()})

    def penalty(self, course: Course) -> None:
        if self.form != "coupled":
            return
        values = course.weights()
        rests = [None if is_head(n) else course.memory.tensors[n] for n in values]
        course.note("penalty", pull([*values.values()], rests, [self._pull(n) for n in values]))

    @torch.no_grad()
    def after_step(self, course: Course) -> None:
        if self.form == "decoupled":
            for name, parameter in course.weights().items():
                if not parameter.requires_grad:
                    continue  # what rests in this step stays where it is, as it does in the coupled form
                share = course.rate_of(name) * self._pull(name)
                if is_head(name):
                    parameter.mul_(1 - share)
                else:
                    parameter.lerp_(course.memory.tensors[name], share)

    def _pull(self, name: str) -> float:
        return self.beta if is_head(name) else self.alpha

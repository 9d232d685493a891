"""Prefer the better of two answers by making it likelier than the base holds it, and the worse one less likely.

    h = [log p(y+|x) - log p0(y+|x)] - [log p(y-|x) - log p0(y-|x)]      sums over the tokens of each answer
    L = -log σ(β h)

p is the model with its tuning, p0 the base: the same weights with the tuning asleep, so no second model is in memory.
β (log p - log p0) is the reward that an answer has by what was learnt; evaluations give its margin and how often the
better answer has more of it.

`form` chooses the loss: "sigmoid" is that above; "ipo" is (h - 1 / 2β)² with h of the means per token; "hinge" is
max(0, 1 - β h); "robust" takes a share `noise` of the pairs to be the wrong way round; "normalised" is "sigmoid" with h
of the means per token, so that a long answer weighs no more than a short one; "shares" is -[q log σ(β h) + (1 - q)
log σ(-β h)] with q from the column `share`, how many judges are for the better answer.

Paper: arXiv:2305.18290. IPO: arXiv:2310.12036. Robust: arXiv:2403.00409.

Neutral: none. With β = 0 nothing is learnt at all.
Cost: one forward pass of the base a step, or one over the rows in all with `stored`; a pair is two rows.
Claims: preferences are learnt without a reward model and without sampling.
Pitfalls: both answers may become less likely while the margin grows; the score chosen_reward says so, below 0. A rate
that suits plain training is too high here: ten times less is a beginning. Pairs should be answers that the base could
have given; learn the better answers as text first where they are not.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError, above, between
from luthier.runs.spec import RunSpec
from luthier.training.answers import Answer
from luthier.training.course import Course
from luthier.training.preference import Preference, keep_reference
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("dpo", family="preference", paper="arXiv:2305.18290")
@dataclass(frozen=True, kw_only=True)
class DPO(Preference):
    """Direct preference optimisation."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl"
    reference: ClassVar[bool] = True
    extra_forwards: ClassVar[float] = 1.0
    tiny: ClassVar[dict[str, Any]] = {"beta": 0.5}

    beta: Annotated[float, "how much a reward is of the log-ratio; smaller, farther from the base", above(0)] = 0.1
    form: Annotated[Literal["sigmoid", "ipo", "hinge", "robust", "normalised", "shares"], "the loss of a pair"] = (
        "sigmoid"
    )
    noise: Annotated[float, "with robust, share of the pairs that are the wrong way round", between(0, 0.49)] = 0.0
    stored: Annotated[bool, "ask the base about all rows once, before step 1, in place of every step"] = False

    def check(self, spec: RunSpec) -> None:
        if (self.noise > 0) != (self.form == "robust"):
            raise ConfigError(
                f"dpo.noise is {self.noise:g} and dpo.form {self.form!r}: noise is a share of wrong pairs, which only "
                "robust heeds. Set both, such as form=robust noise=0.1, or leave both out."
            )

    def before_step(self, course: Course) -> None:
        if self.stored:
            keep_reference(course)

    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        by_token = self.form in ("ipo", "normalised")
        h = chosen.mean_ratio - rejected.mean_ratio if by_token else chosen.ratio - rejected.ratio  # (pairs,)
        if self.form == "ipo":
            return (h - 1 / (2 * self.beta)).square()
        if self.form == "hinge":
            return F.relu(1 - self.beta * h)
        right, wrong = F.logsigmoid(self.beta * h), F.logsigmoid(-self.beta * h)
        if self.form == "shares":
            return -(marks[:, 0] * right + (1 - marks[:, 0]) * wrong)
        return -((1 - self.noise) * right - self.noise * wrong) / (1 - 2 * self.noise)

    def reward(self, answer: Answer) -> Tensor:
        return self.beta * (answer.mean_ratio if self.form in ("ipo", "normalised") else answer.ratio)

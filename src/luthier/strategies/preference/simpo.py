"""Prefer the better of two answers by its mean log-probability, with a gap between the two.

    r(y) = β log p(y|x) / |y|                            a mean over the tokens of the answer
    L = -log σ(r(y+) - r(y-) - gap) - weight · log p(y+|x) / |y+|

The mean is what is compared when a model writes, and favours neither short nor long answers. There is no reference
model. With `weight` the better answer is learnt as text beside, as in cpo.

Paper: arXiv:2405.14734.

Neutral: none. With β = 0 the pairs say nothing.
Cost: none beyond the second answer.
Claims: better than dpo at less memory and time.
Pitfalls: nothing holds the model near its base: a rate that is too high ruins how it writes. β is ten times and more
that of dpo, since means are small; `gap` is in the unit of r.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from torch import Tensor

from luthier.core import above, at_least
from luthier.training.answers import Answer
from luthier.training.preference import Preference
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("simpo", family="preference", paper="arXiv:2405.14734")
@dataclass(frozen=True, kw_only=True)
class SimPO(Preference):
    """Simple preference optimisation with a reference-free reward."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl"

    beta: Annotated[float, "how much a reward is of the mean log-probability", above(0)] = 2.0
    gap: Annotated[float, "by how much the better reward is to exceed the worse", at_least(0)] = 1.0
    weight: Annotated[float, "of the better answer as text", at_least(0)] = 0.0

    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        h = self.reward(chosen) - self.reward(rejected) - self.gap  # (pairs,)
        return -F.logsigmoid(h) - self.weight * chosen.mean

    def reward(self, answer: Answer) -> Tensor:
        return self.beta * answer.mean

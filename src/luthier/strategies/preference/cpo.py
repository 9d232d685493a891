"""Prefer the better of two answers by its probability alone, and learn it as text beside.

    h = log p(y+|x) - log p(y-|x)                       sums over the tokens of each answer
    L = -log σ(β h) - weight · log p(y+|x) / |y+|

It is dpo with a reference that holds all answers alike, so the base is not asked. The second part keeps the better
answer likely, which the first alone does not.

`form` chooses the first part: "sigmoid" is that above; "hinge" is max(0, 1 - β h); "ipo" is (h - 1 / 2β)² with h of the
means per token.

Paper: arXiv:2401.08417.

Neutral: none. With β = 0 the pairs say nothing.
Cost: none beyond the second answer.
Claims: what dpo learns at less memory and time.
Pitfalls: sums favour short answers: where the better ones are longer, h begins below 0. simpo takes means.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from luthier.core import above, at_least
from luthier.training.answers import Answer
from luthier.training.preference import Preference
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("cpo", family="preference", paper="arXiv:2401.08417")
@dataclass(frozen=True, kw_only=True)
class CPO(Preference):
    """Contrastive preference optimisation."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl"
    tiny: ClassVar[dict[str, Any]] = {"beta": 0.5}

    beta: Annotated[float, "how much a reward is of the log-probability", above(0)] = 0.1
    weight: Annotated[float, "of the better answer as text", at_least(0)] = 1.0
    form: Annotated[Literal["sigmoid", "hinge", "ipo"], "the loss of a pair, beside the text"] = "sigmoid"

    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        h = self.reward(chosen) - self.reward(rejected)  # β times what the page calls h
        if self.form == "ipo":
            loss = (h / self.beta - 1 / (2 * self.beta)).square()
        else:
            loss = F.relu(1 - h) if self.form == "hinge" else -F.logsigmoid(h)
        return loss - self.weight * chosen.mean

    def reward(self, answer: Answer) -> Tensor:
        return self.beta * (answer.mean if self.form == "ipo" else answer.chance)

"""Learn from single answers, each liked or not: no pairs are needed.

    r(y) = β [log p(y|x) - log p0(y|x)]                          sums over the tokens of the answer
    z = max(0, β mean over the step of log p(y'|x) - log p0(y'|x))         y' is the answer to another prompt
    L = liked · (1 - σ(r - z))     for an answer that is liked
    L = disliked · (1 - σ(z - r))  for one that is not

z says how far the model has moved from its base at all, so that an answer counts by what it gains beyond that. It has
no gradient. y' is the answer of the row before, in the step. The base is the same model with the tuning asleep.

Paper: arXiv:2402.01306.

Neutral: none. With both weights 0 nothing is learnt.
Cost: one forward pass of the base a step, and one of both on the mismatched answers.
Claims: as good as learning from pairs, from marks that are cheaper to come by.
Pitfalls: all rows of a step are needed for z, so a step is one micro-batch of two rows or more. Where one kind is
rarer, raise its weight until weight times count of both kinds are alike. Held-out rows are scored with z = 0: a level
is of a step.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import ConfigError, above, at_least
from luthier.runs.spec import RunSpec
from luthier.training.answers import Answer
from luthier.training.preference import Judgement
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("kto", family="preference", paper="arXiv:2402.01306")
@dataclass(frozen=True, kw_only=True)
class KTO(Judgement):
    """Kahneman-Tversky optimisation."""

    example: ClassVar[str] = "sample:smollm2-135m --data LIKED.jsonl"
    extra_passes: ClassVar[float] = 0.0
    extra_forwards: ClassVar[float] = 3.0
    tiny: ClassVar[dict[str, Any]] = {"beta": 0.5}

    beta: Annotated[float, "how much a reward is of the log-ratio; smaller, farther from the base", above(0)] = 0.1
    liked: Annotated[float, "weight of the answers that are liked", at_least(0)] = 1.0
    disliked: Annotated[float, "weight of those that are not", at_least(0)] = 1.0

    def check(self, spec: RunSpec) -> None:
        if spec.batch.size < 2:
            raise ConfigError(
                "kto: an answer is held against one to another prompt of the same step, so a step needs two rows. Use "
                "--batch 2 or more."
            )
        if self.liked == 0 and self.disliked == 0:
            raise ConfigError("kto.liked and kto.disliked are both 0: nothing would be learnt. Raise one of them.")

    def losses(self, answer: Answer, liked: Tensor, elsewhere: Answer | None) -> Tensor:
        z = torch.zeros((), device=liked.device)
        if elsewhere is not None:
            z = self.reward(elsewhere).mean().clamp(min=0).detach()
        r = self.reward(answer)
        good, bad = self.liked * (1 - torch.sigmoid(r - z)), self.disliked * (1 - torch.sigmoid(z - r))
        return torch.where(liked > 0, good, bad)

    def reward(self, answer: Answer) -> Tensor:
        return self.beta * answer.ratio

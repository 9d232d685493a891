"""Write several answers to a prompt; each is measured against the mean reward of the others (REINFORCE, leave one out).

    R_i = r_i - β Σ_t (log p_old(y_t) - log p0(y_t))     p0 the base: the same weights with the tuning asleep
    A_i = R_i - mean of R_j over the others, j ≠ i
    ρ   = p(y) / p_old(y)                                of whole answers; p_old when they were written
    L   = -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)             the mean over answers

The divergence from the base is a part of the reward, so its optimum is that of p ∝ p0 exp(r / β). With `whiten`
advantages are brought to mean 0 and spread 1 over the batch.

Paper: arXiv:2402.14740.

Neutral: none: without rewards there is nothing to learn from prompts.
Cost: `samples` answers to each prompt, a forward pass for each token, and one pass each of the model and its base.
Claims: an unbiased gradient without a model for values, and as good as more elaborate ones.
Pitfalls: with two samples the baseline is one answer: noisy, and a step says little. Where rewards are alike but for
the divergence, only that is learnt. Look at rollouts.jsonl before training long. Dropout is off, as it would change
the chances that are compared.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import at_least, between
from luthier.strategies.rollouts._answers import Lines
from luthier.strategies.rollouts._engine import Rollouts
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("rloo", family="rollouts", paper="arXiv:2402.14740")
@dataclass(frozen=True, kw_only=True)
class RLOO(Rollouts):
    """REINFORCE with the other answers as baseline."""

    tiny: ClassVar[dict[str, Any]] = {"reward": "length", "samples": 3, "new_tokens": 4, "words": 3}

    beta: Annotated[float, "of the divergence from the base, in the reward", at_least(0)] = 0.05
    epsilon: Annotated[float, "how far the ratio of an answer may leave 1 before it is clipped", between(0, 1)] = 0.2
    whiten: Annotated[bool, "advantages of a batch have mean 0 and spread 1"] = False

    @property
    def asks_base(self) -> bool:
        return self.beta > 0

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = held["reward"]
        if self.beta:
            rewards = rewards - self.beta * (held["old"] - held["base"]).sum(1)
        found = self.advantages(rewards.view(-1, self.samples)).view(-1)
        if self.whiten:
            found = (found - found.mean()) / (found.std() + 1e-4)
        return {"advantage": found}

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of each answer, (prompts, samples): 0 in a group of one reward, exactly."""
        others = (rewards.sum(1, keepdim=True) - rewards) / (self.samples - 1)
        same = rewards.max(1, keepdim=True).values == rewards.min(1, keepdim=True).values
        return (rewards - others).masked_fill(same, 0.0)

    def losses(self, course: Course, lines: Lines) -> Tensor:
        ratio = lines.sums(lines.chance - lines.old).exp()  # (lines,)
        advantage = lines.held["advantage"]
        return -torch.min(ratio * advantage, ratio.clamp(1 - self.epsilon, 1 + self.epsilon) * advantage)

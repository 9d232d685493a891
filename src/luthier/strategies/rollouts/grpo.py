"""Write several answers to a prompt, and make those likelier that got more reward than the others.

    A_i = (r_i - mean r) / (std r + 1e-4)         over the `samples` answers to one prompt; without std: scale = "none"
    ρ_t = p(y_t) / p_old(y_t)                     p_old when the answers were written
    L_t = -min(ρ_t A, clip(ρ_t, 1 - ε, 1 + ε_high) A) + β k3_t
    k3_t = p0/p - log(p0/p) - 1                   p0 the base: the same weights with the tuning asleep

`per` says what the sum over tokens is divided by: "answer", its own tokens, then the mean of the answers (the paper);
"token", all tokens of the step, so that a long answer weighs more; "fixed", new_tokens, so that length is neither
rewarded nor punished. A prompt whose answers all got one reward teaches nothing: it is counted, and a step of such
prompts alone makes no update.

Paper: arXiv:2402.03300. Without std and with a fixed divisor: arXiv:2503.20783. A higher upper clip, and by tokens:
arXiv:2503.14476.

Neutral: none: without rewards there is nothing to learn from prompts.
Cost: `samples` answers to each prompt, a forward pass for each token, and one pass each of the model and its base.
Claims: no second model for values: the answers to one prompt are each other's measure.
Pitfalls: a reward that the model never gets teaches nothing; look at rollouts.jsonl before training long. What is
rewarded is what is learnt: length and format are learnt first, whatever was meant. The rate of plain training is too
high here. Dropout is off, as it would change the chances that are compared.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.core import at_least, between
from luthier.strategies.rollouts._answers import Lines
from luthier.strategies.rollouts._engine import Rollouts
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("grpo", family="rollouts", paper="arXiv:2402.03300")
@dataclass(frozen=True, kw_only=True)
class GRPO(Rollouts):
    """Group-relative policy optimisation."""

    tiny: ClassVar[dict[str, Any]] = {"reward": "length", "samples": 3, "new_tokens": 4, "words": 3}

    beta: Annotated[float, "of the divergence from the base", at_least(0)] = 0.04
    epsilon: Annotated[float, "how far a ratio may fall below 1 before it is clipped", between(0, 1)] = 0.2
    epsilon_high: Annotated[float, "how far above; 0, as far as below", at_least(0)] = 0.0
    scale: Annotated[Literal["group", "none"], "advantages are divided by the rewards' spread, or not"] = "group"
    per: Annotated[Literal["answer", "token", "fixed"], "what the sum over tokens is divided by"] = "answer"

    @property
    def asks_base(self) -> bool:
        return self.beta > 0

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"advantage": self.advantages(held["reward"].view(-1, self.samples)).view(-1)}

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of each answer, (prompts, samples): 0 in a group of one reward, exactly."""
        apart = rewards - rewards.mean(1, keepdim=True)
        if self.scale == "group":
            apart = apart / (rewards.std(1, keepdim=True) + 1e-4)
        same = rewards.max(1, keepdim=True).values == rewards.min(1, keepdim=True).values
        return apart.masked_fill(same, 0.0)

    def counts(self, mask: Tensor) -> Tensor:
        whole = {"answer": torch.ones(len(mask)), "token": mask.sum(1)}
        return whole.get(self.per, torch.full((len(mask),), float(self.new_tokens)))

    def losses(self, course: Course, lines: Lines) -> Tensor:
        ratio = (lines.chance - lines.old).exp()
        clipped = ratio.clamp(1 - self.epsilon, 1 + (self.epsilon_high or self.epsilon))
        advantage = lines.held["advantage"][:, None]
        each = -torch.min(ratio * advantage, clipped * advantage)
        if self.beta:
            apart = lines.held["base"] - lines.chance
            each = each + self.beta * (apart.exp() - apart - 1)
        sums = lines.sums(each)
        return sums / lines.mask.sum(1).clamp(min=1) if self.per == "answer" else sums

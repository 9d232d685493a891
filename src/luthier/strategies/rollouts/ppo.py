"""Raise the reward of written answers step by step, each token measured against a value that a head learns (PPO).

    r_t = -β (log p_old(y_t) - log p0(y_t)), and the reward of the answer at its last token
    δ_t = r_t + γ V_{t+1} - V_t,    A_t = Σ_k (γλ)^k δ_{t+k},    R_t = A_t + V_t;    A is whitened over the batch
    L   = mean over tokens of  max(-A ρ, -A clip(ρ, 1 - ε, 1 + ε)) + ½c max((V-R)², (V_clip-R)²)

ρ = p / p_old, V a linear head on the last states of the model that trains, V_clip within `value_epsilon` of what it was
when the answers were written. p0 is the base: the same weights with the tuning asleep. One batch of answers is learnt
from in `updates` rounds of `minibatches` steps. With `target`, β is led so that an answer's divergence comes near it.

Also known as ppo_rlhf.

Paper: arXiv:1707.06347. With a model of rewards and a divergence: arXiv:1909.08593, arXiv:2203.02155.

Neutral: none: without rewards there is nothing to learn from prompts.
Cost: the answers, a forward pass for each token, and three passes beside each batch of them: chances, values, the base.
Claims: each token has its own share of the praise; several steps from one batch of answers.
Pitfalls: many settings, and the value head must learn first: `grpo` or `rloo` are easier and rarely worse. What is
rewarded is what is learnt; look at rollouts.jsonl. Dropout is off, as it would change the chances that are compared.
Text to go on learning beside the rewards (ptx) is not built.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import above, at_least, between
from luthier.data.batches import Batch
from luthier.strategies.rollouts._answers import Lines, in_lines
from luthier.strategies.rollouts._engine import Rollouts
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("ppo", family="rollouts", paper="arXiv:1707.06347")
@dataclass(frozen=True, kw_only=True)
class PPO(Rollouts):
    """Proximal policy optimisation."""

    grouped: ClassVar[bool] = False
    tiny: ClassVar[dict[str, Any]] = {"reward": "length", "new_tokens": 4, "words": 3, "updates": 2, "minibatches": 2}

    samples: Annotated[int, "answers to each prompt", at_least(1)] = 1
    temperature: Annotated[
        float, "divides the logits, where answers are written and where they are learnt", above(0)
    ] = 0.7
    updates: Annotated[int, "rounds over one batch of answers", at_least(1)] = 4
    minibatches: Annotated[int, "steps of a round", at_least(1)] = 1
    beta: Annotated[float, "of the divergence from the base, in the reward of each token", at_least(0)] = 0.05
    target: Annotated[float, "divergence of an answer that beta is led to; 0, beta stays", at_least(0)] = 0.0
    epsilon: Annotated[float, "how far a ratio may leave 1 before it is clipped", between(0, 1)] = 0.2
    value_epsilon: Annotated[float, "how far a value may leave what it was", above(0)] = 0.2
    value_weight: Annotated[float, "c, of the loss of values", at_least(0)] = 0.1
    gamma: Annotated[float, "what a reward one token later is worth", between(0, 1)] = 1.0
    lam: Annotated[float, "lambda: 1, whole returns; 0, one token ahead", between(0, 1)] = 0.95

    @property
    def parts(self) -> int:
        return self.minibatches

    def numbers(self, course: Course) -> dict[str, Tensor]:
        width = int(course.tuned.model.config.get_text_config().hidden_size)
        return {"weight": torch.zeros(width), "bias": torch.zeros(1)}

    def counts(self, mask: Tensor) -> Tensor:
        return mask.sum(1)

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        facts = course.memory.facts
        beta = float(facts.setdefault("beta", self.beta))
        mask = self._mask(held, torch.arange(len(held["size"])))
        values = self._seen(course, held, lambda batch, width: self._pass(course, batch, width)[1]) * mask
        apart = (held["old"] - held["base"]) * mask
        rewards = -beta * apart
        last = (held["size"] - 1)[:, None]
        rewards = rewards.scatter_add(1, last, held["reward"][:, None].to(rewards.dtype)) * mask
        advantage = advantages(rewards, values, mask, self.gamma, self.lam)
        if self.target:  # as arXiv:1909.08593: at most a fiftieth up or down for each batch
            error = max(-0.2, min(0.2, float(apart.sum(1).mean()) / self.target - 1))
            facts["beta"] = beta * (1 + 0.1 * error)
        return {"value": values, "goal": (advantage + values) * mask, "advantage": whitened(advantage, mask)}

    def _numbers(self, held: Mapping[str, Tensor], constant: Tensor) -> dict[str, float]:
        wrong = (held["goal"] - held["value"]).square().sum() / held["size"].sum()
        return {**super()._numbers(held, constant), "value_error": round(float(wrong), 6)}

    def _pass(self, course: Course, batch: Batch, width: int) -> tuple[Tensor, Tensor]:
        with course.states() as seen:
            chance, told = self._tokens(course, batch)
        assert seen.last is not None, "the trunk was passed"
        states = seen.last[:, :-1][told].float()  # (targets, d): what stands before each token
        values = states @ course.numbers["weight"] + course.numbers["bias"]
        return in_lines(chance, told, width), in_lines(values, told, width)

    def losses(self, course: Course, lines: Lines) -> Tensor:
        held = lines.held
        assert lines.values is not None, "there is a head"
        ratio = (lines.chance - lines.old).exp()
        each = torch.max(
            -held["advantage"] * ratio, -held["advantage"] * ratio.clamp(1 - self.epsilon, 1 + self.epsilon)
        )
        near = held["value"] + (lines.values - held["value"]).clamp(-self.value_epsilon, self.value_epsilon)
        wrong = torch.max((lines.values - held["goal"]).square(), (near - held["goal"]).square())
        return lines.sums(each + 0.5 * self.value_weight * wrong)


def advantages(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t, by generalised advantage estimation: (answers, T). Behind an answer's last token all is worth nothing.

    >>> rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.5, 0.5]])
    >>> advantages(rewards, values, torch.ones(1, 3), 1.0, 1.0)
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    found = torch.zeros_like(rewards)
    later, value = torch.zeros(len(rewards)), torch.zeros(len(rewards))
    for t in range(rewards.shape[1] - 1, -1, -1):
        delta = rewards[:, t] + gamma * value - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        value = values[:, t] * mask[:, t]
        found[:, t] = later
    return found


def whitened(values: Tensor, mask: Tensor) -> Tensor:
    """With mean 0 and spread 1 over what counts; equal ones become 0."""
    n = mask.sum().clamp(min=1)
    apart = (values - (values * mask).sum() / n) * mask
    return apart / ((apart.square().sum() / n).sqrt() + 1e-8) if bool(apart.abs().max() > 1e-7) else apart * 0

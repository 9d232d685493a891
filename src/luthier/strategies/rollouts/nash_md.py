"""Seek the policy that no other is preferred to: answers play against those of a mixture with the base (Nash-MD).

    y  ~ p,    y' ~ p_mix,    log p_mix(y'_t) = (1 - m) log p + m log p0 + const        at each token; no gradient
    w  = P(y ≻ y') - 1/2 - τ (log p(y) - log p0(y))            sums over the tokens of the answer; no gradient
    L  = -w log p(y)

p0 is the base: the same weights with the tuning asleep. m = `mixture`: 0 plays against itself, 1 against the base. P is
the judge: a function of your own in a file, `--set judge=my_judge.py` with prefers(prompt, first, second, row), a
number from 0 to 1, asked in both orders and averaged; or, without one, σ(r(y) - r(y')) of the rewards. The reward in
the log is then P against the mixture, and 1/2 is a draw. Preferences that go in a circle have no reward that says the
same; the policy then goes to a mixed answer, where a learner of rewards cannot.

Paper: arXiv:2312.00886. mixture .125 and τ .008 are the paper's as our notes have them, not looked up anew.

Neutral: none: without a judge there is nothing to learn from prompts.
Cost: two answers for each, and the second one asks the base for each token as well; one pass each of model and base.
Claims: needs no scalar reward, and the last policy converges, not only their average.
Pitfalls: one number for a pair is little to learn from: batches must be large. Of a judge that is a reward model this
is a slower way to the same. Dropout is off, as it would change the chances that are compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache

from luthier.core import ConfigError, at_least, between
from luthier.runs.spec import RunSpec
from luthier.strategies.rollouts._answers import Lines, asked_of, prompts_of, texts_of
from luthier.strategies.rollouts._engine import Rollouts
from luthier.strategies.rollouts._rewards import Asked
from luthier.surgery import Tuned
from luthier.training.course import Course
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("nash_md", family="rollouts", paper="arXiv:2312.00886")
@dataclass(frozen=True, kw_only=True)
class NashMD(Rollouts):
    """Nash learning by mirror descent."""

    grouped: ClassVar[bool] = False
    tiny: ClassVar[dict[str, Any]] = {"reward": "length", "samples": 2, "new_tokens": 4, "words": 3}

    samples: Annotated[int, "pairs of answers to each prompt", at_least(1)] = 2
    judge: Annotated[str, "my_judge.py: prefers(prompt, first, second, row); else rewards are compared"] = ""
    mixture: Annotated[float, "m: the base's share in what is played against", between(0, 1)] = 0.125
    tau: Annotated[float, "of the divergence from the base", at_least(0)] = 0.008

    def check(self, spec: RunSpec) -> None:
        if self.updates != 1:
            raise ConfigError(
                f"nash_md.updates is {self.updates}: there is no ratio here. Learn once from each answer."
            )
        super().check(spec)

    def worth(self, course: Course, held: dict[str, Tensor]) -> dict[str, Tensor]:
        line = held["line"].numpy()
        prompts = prompts_of(course.examples(), line)
        seeds = [course.seed_of("opponent", int(row), k % self.samples) for k, row in enumerate(line)]
        others = self._written(
            course, line, prompts, seeds, lambda here: [Mixture(course.tuned, self.mixture)] if self.mixture else []
        )
        assert course.columns is not None
        said = texts_of(course.tokenizer, prompts)
        width = max(len(answer) for answer in others)
        own = [held["answer"][k, :n].tolist() for k, n in enumerate(held["size"].tolist())]
        first, second = (
            asked_of(course.examples(), line.tolist(), said, texts_of(course.tokenizer, ids), course.columns)
            for ids in (own, others)
        )
        liked = torch.tensor(self.rewards.preferred(first, second, course.columns))
        penalty = self.cut_penalty * held["cut"] if self.cut == "penalty" else 0.0
        return {
            "reward": liked,
            "liked": liked - penalty,
            "other": torch.tensor([[*a, *[0] * (width - len(a))] for a in others]),
            "other_size": torch.tensor([len(answer) for answer in others]),
        }

    def losses(self, course: Course, lines: Lines) -> Tensor:
        chance = lines.sums(lines.chance)
        apart = chance.detach() - lines.sums(lines.held["base"])
        return -(lines.held["liked"] - 0.5 - self.tau * apart) * chance

    def valued(self, own: Sequence[Asked], base: Sequence[Asked], columns: Any) -> tuple[list[float], list[float]]:
        """How often the answers are preferred to the base's, and what the base has against itself."""
        return self.rewards.preferred(own, base, columns), [0.5] * len(own)


class Mixture:
    """Makes of the policy's logits (1 - m) of them and m of the base's: a geometric mixture, up to a constant.

    Given to `generate` among its processors of logits; the base has a cache of its own.
    """

    def __init__(self, tuned: Tuned, share: float) -> None:
        self._tuned, self._share = tuned, share
        self._cache = DynamicCache()
        self._seen = 0

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Mixed logits (rows, vocabulary)."""
        model: Callable[..., Any] = self._tuned.model
        with torch.no_grad(), self._tuned.base_only():
            out = model(input_ids=ids[:, self._seen :], past_key_values=self._cache, use_cache=True)
        self._seen = ids.shape[1]
        base = out.logits[:, -1].to(scores.dtype).log_softmax(-1)
        mixed: Tensor = (1 - self._share) * scores.log_softmax(-1) + self._share * base
        return mixed

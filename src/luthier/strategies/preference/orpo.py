"""Learn the better answer as text, and make its odds better than those of the worse one.

    L = -log P(y+) / |y+| - weight · log σ(log odds(y+) - log odds(y-))
    odds = P / (1 - P),  P = exp(mean log p of the answer's tokens)

There is no reference model: one pass over both answers is all. An answer's reward is the mean log p of its tokens.

Paper: arXiv:2403.07691.

Neutral: weight = 0: the better answers are learnt as text, each counting alike however long it is.
Cost: none beyond the second answer.
Claims: one stage in place of supervised tuning and then preferences.
Pitfalls: an answer counts once, a token of a long one less; plain training on the better answers counts each token
alike, which is the same where they are of one length. Log odds are computed from log P without 1 - P, so an answer
that is nearly certain gives no infinity.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from luthier.core import at_least
from luthier.training.answers import Answer, log_odds
from luthier.training.preference import Preference
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("orpo", family="preference", paper="arXiv:2403.07691")
@dataclass(frozen=True, kw_only=True)
class ORPO(Preference):
    """Odds ratio preference optimisation."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl"
    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    tiny: ClassVar[dict[str, Any]] = {"weight": 1.0}

    weight: Annotated[float, "of the odds beside the text of the better answer", at_least(0)] = 0.1

    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        odds = log_odds(chosen.mean) - log_odds(rejected.mean)  # (pairs,)
        return -chosen.mean - self.weight * F.logsigmoid(odds)

    def reward(self, answer: Answer) -> Tensor:
        return answer.mean

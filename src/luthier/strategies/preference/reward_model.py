"""Learn a number for an answer, such that of two answers the better has the higher one.

    Δ = r(x, y+) - r(x, y-)                          r is a new head on the last token of prompt and answer
    L = -[q log σ(Δ - m) + (1 - q) log σ(-(Δ - m))] + center · (r(y+) + r(y-))²

q is the share of judges who found y+ better and m by how much, from columns `share` and `margin` of the rows, where
there are any; else q = 1 and m = 0. That is the loss of the task `reward` by itself; here it can be set otherwise.

Paper: arXiv:2203.02155, section 3.5. Margins: arXiv:2307.09288.

Neutral: center = 0, heed = "all": the task's own loss.
Cost: none beyond the second answer.
Claims: a score that ranks answers, for choosing among them or for learning from it.
Pitfalls: only differences are learnt, so a reward has no zero: center holds it near 0. A model of this kind learns that
longer is better where the rows say so; look at what it prefers.
Where the padding token also ends a turn, the head reads the token before it. A ranking of several answers is given as
pairs, which count alike.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor

from luthier.core import at_least
from luthier.training.answers import bradley_terry
from luthier.training.preference import Ranking
from luthier.training.strategy import STRATEGIES


@STRATEGIES.register("reward_model", family="preference", paper="arXiv:2203.02155")
@dataclass(frozen=True, kw_only=True)
class RewardModel(Ranking):
    """A head whose differences predict which of two answers is better."""

    example: ClassVar[str] = "sample:smollm2-135m --data PAIRS.jsonl"
    neutral: ClassVar[dict[str, Any] | None] = {"center": 0.0, "heed": "all"}
    tiny: ClassVar[dict[str, Any]] = {"center": 0.5}

    center: Annotated[float, "of the square of the two rewards' sum", at_least(0)] = 0.0
    heed: Annotated[Literal["all", "shares", "margins", "none"], "which columns of the rows count"] = "all"

    def losses(self, rewards: Tensor, marks: Tensor) -> Tensor:
        share, margin = marks.unbind(1)
        share = share if self.heed in ("all", "shares") else (share * 0 + 1)
        margin = margin if self.heed in ("all", "margins") else margin * 0
        return bradley_terry(rewards, share, margin) + self.center * rewards.sum(1).square()

"""Rehearse a few old rows in every step while learning the new ones.

    rows of a step = the usual B new rows, and r old ones        r / (B + r) = share, on average

The old rows come from a memory: `memory` rows of the set `old`, each with the same chance, or all of it. They are drawn
anew in every step, without repetition inside it, by the seed and the step alone. Old rows have their own labels; labels
that only they have get outputs of their own behind the new ones.

Paper: arXiv:2205.12393, whose memory is 1 % of the old rows. The shares here are our choice.

Neutral: share = 0.
Cost: share more rows in every step; no further pass.
Claims: old abilities are kept nearly whole by very few rehearsed rows.
Pitfalls: start from the model that has learnt the old rows (`luthier merge`), or there is nothing to keep. Rows that
also stand in the test half are set aside. Replayed rows are not put with others of their length.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from luthier.core import at_least, between, key
from luthier.data.order import ChosenOrder, Order, shuffled
from luthier.data.sets import Sets
from luthier.runs.spec import RunSpec
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("replay", family="mixture", paper="arXiv:2205.12393")
@dataclass(frozen=True, kw_only=True)
class Replay(Strategy):
    """Old rows beside the new ones."""

    neutral: ClassVar[dict[str, Any] | None] = {"share": 0.0}
    sets: ClassVar[tuple[str, ...]] = ("old",)
    tiny: ClassVar[dict[str, Any]] = {"share": 0.3}

    share: Annotated[float, "share of a step's rows that are old", between(0, 0.9)] = 0.1
    memory: Annotated[int, "old rows that are kept to draw from; 0, all", at_least(0)] = 0

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        old = sets.rows("old")
        kept = old[shuffled(len(old), spec.seed, "replay memory")[: self.memory or len(old)]]

        def choose(epoch: int, step: int) -> NDArray[np.int64]:
            new = usual.rows(epoch, step)
            wanted = self.share / (1 - self.share) * len(new)
            name = (spec.seed, "replay", epoch, step)
            chance = np.random.Philox(key(*name, "count")).random_raw(1)[0] / 2**64
            count = min(len(kept), int(wanted) + int(chance < wanted % 1))
            return np.concatenate([new, kept[shuffled(len(kept), *name)[:count]]])

        return ChosenOrder(usual, choose)

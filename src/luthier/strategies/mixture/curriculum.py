"""Easy rows first: a step draws among those whose difficulty the model's competence has reached.

    c(t) = min(1, sqrt(t (1 - c0^2) / T_c + c0^2))          t = steps done, T_c = until * all steps
    a row may come at t where the share of strictly easier rows is at most c(t)

Difficulty is the length in tokens; rows of one length are reached together. Before T_c each step draws among the rows
that are reached, without repetition; where these are fewer than a step holds, the step is smaller. From T_c on, and as
soon as all are reached, the order is the usual one.

Paper: arXiv:1903.09848, sections 2.1 and 2.2 (square-root competence; length as difficulty).

Neutral: c0 = 1.
Claims: training in less time to the same result in translation, and better results of small runs.
Pitfalls: where long rows are not the harder ones half of the run learns from biased rows. Before T_c an epoch is no
pass over the rows: some come several times.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from luthier.core import between
from luthier.data.order import ChosenOrder, Order, shuffled
from luthier.data.sets import Sets
from luthier.runs.spec import RunSpec
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("curriculum", family="mixture", paper="arXiv:1903.09848")
@dataclass(frozen=True, kw_only=True)
class Curriculum(Strategy):
    """Competence-based curriculum by length."""

    neutral: ClassVar[dict[str, Any] | None] = {"c0": 1.0}
    tiny: ClassVar[dict[str, Any]] = {"c0": 0.9, "until": 1.0}

    c0: Annotated[float, "share of the rows that the first step draws among", between(0, 1)] = 0.01
    until: Annotated[float, "share of the steps after which all rows come", between(0.001, 1)] = 0.5

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        ordered = np.sort(usual.lengths)
        easier = np.searchsorted(ordered, usual.lengths, side="left") / len(ordered)  # (rows,)
        total = spec.total_steps(usual.steps_per_epoch)

        def choose(epoch: int, step: int) -> NDArray[np.int64]:
            reached = np.flatnonzero(easier <= self.competence(epoch * usual.steps_per_epoch + step, total))
            if len(reached) == len(easier):
                return usual.rows(epoch, step)
            drawn = shuffled(len(reached), spec.seed, "curriculum", epoch, step)[: usual.size]
            return reached[drawn].astype(np.int64)

        return ChosenOrder(usual, choose)

    def competence(self, done: int, total: int) -> float:
        """Share of the rows that may come after `done` of `total` steps."""
        grown = done * (1 - self.c0**2) / max(1.0, self.until * total) + self.c0**2
        return float(min(1.0, grown**0.5))

"""Several sets of rows are learnt together, and each is seen as often as its size, tempered, says.

    p_i = min(n_i, cap)^a / sum_j min(n_j, cap)^a                          n_i: rows of set i

    by = "size":         a = 1 / temperature               1 is proportional; a high temperature is equal
    by = "annealed":     a = 1 - 0.8 (e - 1) / (E - 1)      in epoch e of E: proportional first, nearly equal last

An epoch has as many rows as all sets together, in steps of the usual size. Each set fills its share of them to a row,
at least one, from its own shuffled rows, again and again where it is small. `single` makes steps of one set each.

Paper: arXiv:1910.10683, section 3.5.2 (caps, temperature). Annealed: arXiv:1902.02671.

Neutral: none; with further rows the run is another one.
Claims: the temperature decides between large sets, which learn undisturbed, and small ones, which are not drowned.
Pitfalls: labels of all sets are outputs of one head; labels of one name are one output. Rows are not put with others of
their length, so micro-batches hold more padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.core import above, at_least
from luthier.data.order import ChosenOrder, Order, again_and_again, shuffled
from luthier.data.sets import Sets
from luthier.runs.spec import RunSpec
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("mtl_sampling", family="mixture", paper="arXiv:1910.10683")
@dataclass(frozen=True, kw_only=True)
class MTLSampling(Strategy):
    """A mixture of sets."""

    neutral: ClassVar[dict[str, Any] | None] = None
    sets: ClassVar[tuple[str, ...]] = ("*",)

    by: Annotated[Literal["size", "annealed"], "what the chance of a set follows"] = "size"
    temperature: Annotated[float, "1, by size; higher, more equal", above(0)] = 1.0
    cap: Annotated[int, "rows that a set counts for, at most; 0, all", at_least(0)] = 0
    single: Annotated[bool, "each step holds rows of one set"] = False

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        rows = [sets.rows(name) for name in sets.names]
        steps = -(-sum(map(len, rows)) // usual.size)
        epochs = -(-spec.total_steps(steps) // steps)

        @lru_cache(maxsize=2)
        def laid_out(epoch: int) -> NDArray[np.int64]:
            power = 1 - 0.8 * epoch / max(1, epochs - 1) if self.by == "annealed" else 1 / self.temperature
            shares = self.shares([len(r) for r in rows], power)
            units, size = (steps, usual.size) if self.single else (steps * usual.size, 1)
            parts = [
                again_and_again(one, count * size, "set", spec.seed, number, epoch).reshape(count, size)
                for number, (one, count) in enumerate(zip(rows, whole_counts(shares, units), strict=True))
            ]
            every = np.concatenate(parts)  # (units, size)
            return every[shuffled(units, spec.seed, "mixture", epoch)].reshape(-1)

        return ChosenOrder(usual, lambda e, s: laid_out(e)[s * usual.size : (s + 1) * usual.size], steps)

    def shares(self, sizes: Sequence[int], power: float) -> NDArray[np.float64]:
        """The chance of each set, from its rows."""
        counted: NDArray[np.float64] = np.minimum(sizes, self.cap or max(sizes)).astype(np.float64) ** power
        return np.asarray(counted / counted.sum())


def whole_counts(shares: NDArray[np.float64], total: int) -> list[int]:
    """Whole numbers in these shares that add up to `total`; the largest rests are rounded up, and none gets nothing."""
    counts = np.floor(shares * total).astype(np.int64)
    counts[np.argsort(counts - shares * total, kind="stable")[: total - int(counts.sum())]] += 1
    for empty in np.flatnonzero(counts == 0)[: max(0, total - len(counts))]:
        counts[int(counts.argmax())] -= 1
        counts[empty] = 1
    return [int(n) for n in counts]

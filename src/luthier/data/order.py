"""The order of the data: which rows make which optimiser step.

Which rows make optimiser step s of epoch e follows from (seed, e, s) alone: not from the steps before, not from the
number of workers, and not from how a step is cut into micro-batches. So a resumed run needs two numbers, and a step
that does not fit in memory can be cut finer without becoming another step.
"""

from collections.abc import Callable
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from luthier.core import DataError, key

__all__ = ["ChosenOrder", "Order", "again_and_again", "shuffled"]

MEGA_STEPS = 50
"""Rows are sorted by length inside groups of this many steps: little padding, and the order stays random enough."""


def shuffled(n: int, *name: int | str) -> NDArray[np.int64]:
    """A permutation of 0..n-1 that is named by (seed, stream, numbers).

    Made from the raw 64-bit words of a bit generator, whose stream numpy promises to keep; it does not promise that
    for `permutation`. Equal words (about n^2 / 2^65 of all draws) keep the order of their indices.
    """
    words = np.random.Philox(key(*name)).random_raw(n)
    return np.argsort(words, kind="stable").astype(np.int64)


def again_and_again(rows: NDArray[np.int64], count: int, *name: int | str) -> NDArray[np.int64]:
    """So many of `rows`: all of them, shuffled, then all of them shuffled anew, as often as it takes."""
    rounds = range(max(1, -(-count // len(rows))))
    return np.concatenate([rows[shuffled(len(rows), *name, k)] for k in rounds])[:count]


class Order:
    """Which examples make which optimiser step.

    Args:
        lengths: tokens of each example, (n,).
        size: examples of one step; the last step of an epoch may have fewer.
        seed: names the order.
        group_by_length: put examples of like length in one step.
        tasks: the number of each example's task, where rows say which they are of, (n,).
    """

    def __init__(
        self, lengths: NDArray[np.int64], size: int, seed: int, group_by_length: bool = True,
        tasks: NDArray[np.int64] | None = None,
    ) -> None:  # fmt: skip
        if len(lengths) == 0:
            raise DataError("there are no rows to train on. Give a source with at least one usable row.")
        self.lengths = lengths
        self.size = size
        self.seed = seed
        self.tasks = tasks
        self._group = group_by_length
        self._layouts: dict[int, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._lock = Lock()

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch, the last and smaller one included."""
        return -(-len(self.lengths) // self.size)

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        """The examples of one step; each example is in exactly one step of an epoch."""
        if not 0 <= step < self.steps_per_epoch:
            raise IndexError(f"epoch {epoch} has steps 0 to {self.steps_per_epoch - 1}, not {step}")
        with self._lock:  # workers ask too
            if epoch not in self._layouts:
                while len(self._layouts) > 1:  # at an epoch's edge, workers ask for two epochs in turn
                    self._layouts.pop(min(self._layouts))
                self._layouts[epoch] = self._lay_out(epoch)
            order, steps = self._layouts[epoch]
        start = int(steps[step]) * self.size
        return order[start : start + self.size]

    def at(self, global_step: int) -> tuple[int, int]:
        """(epoch, step in it) of the step that is `global_step` steps from the start."""
        return divmod(global_step, self.steps_per_epoch)

    def _lay_out(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = shuffled(len(self.lengths), self.seed, "order", epoch)
        if self._group:
            mega = MEGA_STEPS * self.size
            group = np.arange(len(order)) // mega
            order = order[np.lexsort((self.lengths[order], group))]
            return order, shuffled(self.steps_per_epoch, self.seed, "steps", epoch)
        return order, np.arange(self.steps_per_epoch, dtype=np.int64)


class ChosenOrder(Order):
    """Steps whose examples somebody else chooses, as a pure function of (epoch, step in it).

    Args:
        usual: the order in whose place it stands.
        steps: steps of an epoch; left out, the usual ones.
        choose: the examples of a step; asked by several threads.
    """

    def __init__(self, usual: Order, choose: Callable[[int, int], NDArray[np.int64]], steps: int | None = None) -> None:
        super().__init__(usual.lengths, usual.size, usual.seed, tasks=usual.tasks)
        self._choose, self._steps = choose, steps or usual.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return self._steps

    def rows(self, epoch: int, step: int) -> NDArray[np.int64]:
        return self._choose(epoch, step)

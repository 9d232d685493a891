"""The widest batches first, for evaluation and training: memory runs out before step 1 or not at all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from luthier.data.batches import Batch
from luthier.training.loop_state import LoopState
from luthier.training.optimiser import Lomo
from luthier.training.out_of_memory import is_out_of_memory, make_room
from luthier.training.trial import as_wide

__all__ = ["try_longest"]


def try_longest(
    loop: LoopState, gradients: Callable[[int, list[Batch]], list[float]], set_mode: Callable[..., None]
) -> None:
    """One pass over the widest batch, which moves nothing; what it holds is counted.

    Where step 1 is as wide itself, as with rows of one length, it is the trial: another would take as long.

    Args:
        gradients: backward through micro-batches of a step.
        set_mode: training or evaluation.

    Raises:
        ResourceError: one row alone does not fit in memory.
    """
    if loop.evaluations.evaluator is not None:
        set_mode(training=False)
        loop.evaluations.evaluator.try_longest()
    set_mode(training=True)
    loop.moments.before_step(0, loop.total, 0)  # what step 1 will remember, the trial needs too
    longest, first = loop.feed.longest(), loop.feed.cut(0)
    alike = not loop.moments.wake() and not isinstance(loop.optimiser, Lomo)  # a later phase may hold more
    if alike and len(first) == 1 and as_wide(first[0], longest):
        loop.trial.begin()
        return
    while True:
        loop.trial.begin()
        try:
            measuring = loop.optimiser.measuring() if isinstance(loop.optimiser, Lomo) else nullcontext()
            with loop.moments.trying(), measuring:  # a pass that moves nothing
                gradients(0, [longest])
            loop.trial.count()
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            loop.trial.end()
            loop.saver.shrink(0, [longest], error)
        finally:
            loop.trial.end()
            loop.optimiser.zero_grad()
        make_room()
        longest = loop.feed.fitting(longest)

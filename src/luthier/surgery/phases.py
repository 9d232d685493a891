"""Parts of one run in which only some of the trained tensors learn: which one a step lies in, and who learns there.

    steps  1 ........ 40 41 ............... 100      Phase(0.4, trains=head), Phase(0.6)
           the head      everything, anew

A phase follows from the step and the length of the run. What has been entered is a number in the checkpoint, so a
resumed run enters no phase twice, wherever it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from luthier.core import CompositionError, ConfigError
from luthier.surgery.method import Method
from luthier.surgery.phase import Phase
from luthier.surgery.view import TunedView

__all__ = ["Phases"]


class Phases:
    """The phases of what trains on a model; none for most methods.

    Attributes:
        entered: the last phase that was entered, from 0; -1 for none.
    """

    def __init__(self, tuned: TunedView, parts: Iterable[Method]) -> None:
        held: list[tuple[Method, Sequence[Phase]]] = [(p, found) for p in parts if (found := p.phases(tuned))]
        if len(held) > 1:
            names = " and ".join(part.name for part, _ in held)
            raise CompositionError(
                f"{names} both cut the run into phases of their own. Train them one after the other."
            )
        self.tuned = tuned
        self.part: Method | None = held[0][0] if held else None
        self.all: Sequence[Phase] = held[0][1] if held else ()
        self.entered = -1

    def __bool__(self) -> bool:
        return bool(self.all)

    def bounds(self, total: int) -> list[int]:
        """After how many steps each phase ends."""
        whole, ends, so_far = sum(p.share for p in self.all), [], 0.0
        for phase in self.all:
            so_far += phase.share
            ends.append(round(total * so_far / whole))
        return ends

    def check(self, total: int) -> None:
        """Refuse a run that is too short.

        Raises:
            ConfigError: a phase would have no step.
        """
        ends = self.bounds(total)
        lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        if self.part is not None and min(lengths) < 1:
            raise ConfigError(
                f"{self.part.name}: its {len(ends)} phases would last {', '.join(map(str, lengths))} steps in a run of "
                f"{total}. Train longer, or let the phases be more equal."
            )

    def number(self, step: int, total: int) -> int:
        """Which phase step `step`, from 1, lies in. One that was entered is not left for an earlier one."""
        found = sum(step > end for end in self.bounds(total)[:-1])
        return max(found, self.entered)

    def enter(self, step: int, total: int) -> Phase | None:
        """The phase that begins with this step and has not been entered; its method has been told."""
        number = self.number(step, total)
        if self.part is None or number == self.entered:
            return None
        self.entered = number
        self.part.enter(self.tuned, number)
        return self.all[number]

    def learning(self, names: Iterable[str]) -> set[str]:
        """Those of the trained tensors that learn in the phase that was entered."""
        return {n for n in names if self.part is None or self.all[self.entered].trains(n)}

    def settled(self, step: int, total: int) -> bool:
        """Whether after `step` steps the last phase that begins anew has made a step: what is there is a result."""
        last = max((i for i, phase in enumerate(self.all) if phase.fresh), default=0)
        return not last or step > self.bounds(total)[last - 1]

    def schedule(self, step: int, total: int) -> tuple[int, int, float]:
        """Step `step`, from 1, in the schedule that it belongs to, that schedule's length, and the phase's rate."""
        if self.part is None:
            return step, total, 1.0
        ends, number = self.bounds(total), self.number(step, total)
        first = max((i for i in range(1, number + 1) if self.all[i].fresh), default=0)
        after = next((i for i in range(number + 1, len(self.all)) if self.all[i].fresh), len(self.all))
        begin = ends[first - 1] if first else 0
        return step - begin, ends[after - 1] - begin, self.all[number].rate

"""One part of a run in which only some of the trained tensors learn. What is done with it: `phases`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Phase"]


def _everything(name: str) -> bool:
    return True


@dataclass(frozen=True)
class Phase:
    """A part of a run.

    Attributes:
        share: of the run's steps; those of all phases are scaled to sum to one.
        trains: whether the trained tensor of this canonical name learns here; the others lie still.
        fresh: it begins with empty moments and a schedule of its own; else both go on.
        rate: multiplies the run's learning rate.
    """

    share: float
    trains: Callable[[str], bool] = _everything
    fresh: bool = True
    rate: float = 1.0

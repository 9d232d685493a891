"""Slanted triangular rates: a short steep rise, then a long linear fall.

    cut = floor(T * cut_frac)
    p   = t / cut                                        while t < cut
          1 - (t - cut) / (cut * (1 / cut_frac - 1))     after that, at least 0
    rate = peak * (1 + p * (ratio - 1)) / ratio          t = step - 1, counted from 0

Starts and ends at peak / ratio, and reaches the peak at step cut + 1.

Paper: arXiv:1801.06146.

Neutral: none; ratio = 1 is a constant rate. The schedule and the warm-up of the spec are not used.
Claims: quick convergence to a good region, then slow refinement.
Pitfalls: in runs of fewer than 1 / cut_frac steps nothing rises: the first step has the peak rate.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.core import at_least, between
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("stlr", family="pace", paper="arXiv:1801.06146")
@dataclass(frozen=True, kw_only=True)
class STLR(Strategy):
    """Slanted triangular learning rates."""

    neutral: ClassVar[dict[str, Any] | None] = None

    cut_frac: Annotated[float, "share of the steps in which the rate rises", between(0.001, 0.999)] = 0.1
    ratio: Annotated[float, "peak rate by the lowest one", at_least(1)] = 32.0

    def rate(self, step: int, total: int) -> float:
        t, cut = step - 1, int(total * self.cut_frac)
        if t < cut:
            p = t / cut
        elif cut:
            p = max(0.0, 1 - (t - cut) / (cut * (1 / self.cut_frac - 1)))
        else:
            p = max(0.0, 1 - t / total)
        return (1 + p * (self.ratio - 1)) / self.ratio

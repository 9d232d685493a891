"""How far forecasts were off: from finished runs, as an interval that the next one falls into."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

__all__ = ["COVERAGE", "Interval", "Pair", "Residuals", "committed", "interval", "residuals"]

COVERAGE = 0.9
ENOUGH = 19  # of which the 5 % quantiles with one more to come are the smallest and the largest


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One finished run: bytes that were forecast for its peak, and bytes that were measured."""

    model: str
    method: str
    family: str
    device: str
    rows: int
    tokens: int
    forecast: int
    measured: int

    @property
    def ratio(self) -> float:
        """The logarithm of measured over forecast: above 0, the forecast was too low."""
        return math.log(self.measured / self.forecast)


@dataclass(frozen=True)
class Interval:
    """A forecast with its ends; `n` runs stand behind it, 0 where no run on such a device does."""

    low: int
    likely: int
    high: int
    n: int


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """What forecasts of runs that were not used for their intervals were worth.

    Attributes:
        median_error: of |measured / forecast - 1|.
        covered: share of runs inside their interval, each made from the other runs.
        above: share of runs above their interval: the error that hurts.
    """

    n: int
    median_error: float
    covered: float
    above: float


def committed() -> tuple[Pair, ...]:
    """The pairs of our own grid, which come with the package (benchmarks/plan_grid.py)."""
    text = (files("luthier.forecast") / "pairs.json").read_text(encoding="utf-8")
    return tuple(Pair(**values) for values in json.loads(text))


def interval(forecast: int, device: str, family: str, pairs: Iterable[Pair], certain: int, growing: int) -> Interval:
    """The interval of a forecast.

    With `n` runs on such a device its ends are the conformal quantiles of their log ratios; the method's own family is
    used where it has enough of them. Without enough runs the ends are assumed, and wide.

    Args:
        certain: bytes that are held whatever happens.
        growing: activations: where nothing is known, the upper end allows for twice as many.
    """
    there = [p for p in pairs if p.device == device]
    own = [p for p in there if p.family == family]
    used = own if len(own) >= ENOUGH else there
    if len(used) < ENOUGH:
        return Interval(certain, forecast, round(1.2 * (forecast + growing)), 0)
    ratios = sorted(p.ratio for p in used)
    low, high = _ends(ratios)
    middle = ratios[len(ratios) // 2]
    scaled = [round(forecast * math.exp(r)) for r in (low, middle, high)]
    return Interval(max(certain, scaled[0]), max(certain, scaled[1]), max(certain, scaled[2]), len(used))


def _ends(ratios: Sequence[float]) -> tuple[float, float]:
    """Both conformal ends: of n + 1 equally likely places for the next one, so many lie outside on either side."""
    n, tail = len(ratios), (1 - COVERAGE) / 2
    low = max(1, math.floor((n + 1) * tail))
    high = min(n, math.ceil((n + 1) * (1 - tail)))
    return ratios[low - 1], ratios[high - 1]


def residuals(pairs: Sequence[Pair]) -> Residuals | None:
    """How good the intervals are: each run's is made from the others. None for too few runs."""
    if len(pairs) <= ENOUGH:
        return None
    inside = above = 0
    errors = []
    for i, pair in enumerate(pairs):
        others = [*pairs[:i], *pairs[i + 1 :]]
        found = interval(pair.forecast, pair.device, pair.family, others, 0, 0)
        inside += found.low <= pair.measured <= found.high
        above += pair.measured > found.high
        errors.append(abs(pair.measured / found.likely - 1))
    n = len(pairs)
    return Residuals(n=n, median_error=sorted(errors)[n // 2], covered=inside / n, above=above / n)

"""How far forecasts were off: from finished runs, as an interval that the next one falls into."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np

__all__ = [
    "COVERAGE", "ENOUGH", "Interval", "Pair", "Residuals", "committed", "constant_of", "ends_of", "interval",
    "leave_out", "residuals",
]  # fmt: skip

COVERAGE = 0.9
ENOUGH = 19  # of which the 5 % quantiles with one more to come are the smallest and the largest
BEYOND = 1.5  # times the largest forecast that is known: a ratio of small runs says little of a run larger than that


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

    def ratio(self, constant: int = 0) -> float:
        """The logarithm of measured over forecast and constant: above 0, they were too low."""
        return math.log(self.measured / (self.forecast + constant))


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
        median_error: of |measured / likely - 1|.
        covered: share of runs inside their interval, each made from the runs of other methods.
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


def constant_of(pairs: Sequence[Pair]) -> int:
    """Bytes that every run takes beside what is counted: with it, the sum of all |log ratios| is the smallest.

    The sum has its minimum where a run is met exactly, so only the differences of the runs are tried. An offset that is
    left in the ratio would grow with the model.

    >>> runs = [Pair(model="m", method="x", family="", device="cpu", rows=1, tokens=1, forecast=f, measured=f + 150)
    ...         for f in (400, 900, 4000)]
    >>> constant_of(runs)
    150
    """
    forecast = np.array([p.forecast for p in pairs], float)
    measured = np.array([p.measured for p in pairs], float)
    tried = np.unique(np.maximum(0, np.append(measured - forecast, 0)))
    sums = np.abs(np.log(measured / (forecast + tried[:, None]))).sum(1)  # (tried,): each on all runs
    return int(tried[sums.argmin()])


def interval(forecast: int, device: str, family: str, pairs: Iterable[Pair], certain: int, growing: int) -> Interval:
    """The interval of a forecast.

    With `n` runs on such a device a constant is fitted to them, and the ends are the conformal quantiles of the log
    ratios that it leaves; the method's own family is used where it has enough of them. Without enough runs, or far
    beyond the largest of them, the ends are assumed, and wide.

    Args:
        certain: bytes that are held whatever happens.
        growing: activations: where nothing is known, the upper end allows for twice as many.
    """
    there = [p for p in pairs if p.device == device]
    if len(there) < ENOUGH:
        return Interval(certain, forecast, round(1.2 * (forecast + growing)), 0)
    constant = constant_of(there)
    if forecast > BEYOND * max(p.forecast for p in there):
        return Interval(certain, forecast + constant, round(1.2 * (forecast + constant + growing)), 0)
    own = [p for p in there if p.family == family]
    used = own if len(own) >= ENOUGH else there
    ratios = sorted(p.ratio(constant) for p in used)
    low, high = ends_of(ratios)
    middle = ratios[len(ratios) // 2]
    scaled = [round((forecast + constant) * math.exp(r)) for r in (low, middle, high)]
    return Interval(max(certain, scaled[0]), max(certain, scaled[1]), max(certain, scaled[2]), len(used))


def ends_of(ratios: Sequence[float]) -> tuple[float, float]:
    """Both conformal ends: of n + 1 equally likely places for the next one, so many lie outside on either side."""
    n, tail = len(ratios), (1 - COVERAGE) / 2
    low = max(1, math.floor((n + 1) * tail))
    high = min(n, math.ceil((n + 1) * (1 - tail)))
    return ratios[low - 1], ratios[high - 1]


def leave_out(pairs: Sequence[Pair], known: Sequence[Pair] = ()) -> list[Interval | None]:
    """Each run's interval from the runs of other methods, and of those from `known`; None where they say too little."""
    found: list[Interval | None] = []
    for pair in pairs:
        others = [p for p in (*pairs, *known) if p.method != pair.method]
        made = interval(pair.forecast, pair.device, pair.family, others, 0, 0)
        found.append(made if made.n else None)
    return found


def residuals(pairs: Sequence[Pair], known: Sequence[Pair] = ()) -> Residuals | None:
    """How good the intervals are: each run's is made from the runs of other methods. None where no run has one."""
    judged = [(pair, made) for pair, made in zip(pairs, leave_out(pairs, known), strict=True) if made is not None]
    if not judged:
        return None
    n = len(judged)
    errors = sorted(abs(pair.measured / made.likely - 1) for pair, made in judged)
    return Residuals(
        n=n,
        median_error=errors[n // 2],
        covered=sum(made.low <= pair.measured <= made.high for pair, made in judged) / n,
        above=sum(pair.measured > made.high for pair, made in judged) / n,
    )

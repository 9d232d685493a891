"""How long steps take: a forecast with its ends, and what forecasts of finished runs were worth."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

from luthier.forecast.interval import ENOUGH, Residuals, ends_of

__all__ = ["How", "Span", "Steps", "TimePair", "committed_times", "residuals_of_times", "span", "spans_left_out"]

How = Literal["counted", "probed", "loading"]
"""work over measured rates; real steps; bytes of weights over the measured rate of moving them"""

UNKNOWN: dict[str, tuple[float, float]] = {"counted": (1 / 3, 6.0), "probed": (0.6, 2.0), "loading": (0.3, 5.0)}
"""Factors of the ends where too few runs are known: assumed, and wide."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """The steps of a run, as far as their time follows from them.

    Attributes:
        rows, tokens: of a step on average, its padding counted.
        width: of a micro-batch, weighted by its tokens: with it, what grows with the square of a row's length is right.
        pieces: micro-batches of a step.
        supervised: share of the tokens that stand in the loss.
        total: steps of the run; None where no rows say it.
        widest: rows and tokens of the widest micro-batch.
    """

    rows: float
    tokens: float
    width: float
    pieces: float
    supervised: float
    total: int | None
    widest: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class TimePair:
    """One finished run: seconds that were forecast and seconds that were measured, of a step or of loading."""

    model: str
    method: str
    family: str
    device: str
    how: How
    forecast: float
    measured: float

    @property
    def ratio(self) -> float:
        """The logarithm of measured over forecast: above 0, it was too low."""
        return math.log(self.measured / self.forecast)


@dataclass(frozen=True)
class Span:
    """Seconds with their ends; `n` runs stand behind it, 0 where the ends are assumed."""

    low: float
    likely: float
    high: float
    n: int

    def times(self, steps: float) -> Span:
        """Of so many steps."""
        return Span(self.low * steps, self.likely * steps, self.high * steps, self.n)


def committed_times() -> tuple[TimePair, ...]:
    """The pairs of our own grid, which come with the package (benchmarks/plan_grid.py)."""
    text = (files("luthier.forecast") / "time_pairs.json").read_text(encoding="utf-8")
    return tuple(TimePair(**values) for values in json.loads(text))


def span(seconds: float, how: How, device: str, family: str, pairs: Iterable[TimePair]) -> Span:
    """The interval of a forecast: conformal quantiles of measured over forecast, of runs on such a kind of device.

    The method's own family is used where it has enough runs. Without enough the ends are assumed, and wide: a forecast
    of time is never a point.

    >>> found = span(2.0, "counted", "cpu", "partial", [])
    >>> found.low < found.likely < found.high, found.n
    (True, 0)
    """
    there = [p for p in pairs if p.how == how and p.device == device]
    own = [p for p in there if p.family == family]
    used = own if len(own) >= ENOUGH else there
    if len(used) < ENOUGH:
        low, high = UNKNOWN[how]
        return Span(low * seconds, seconds, high * seconds, 0)
    ratios = sorted(p.ratio for p in used)
    low, high = ends_of(ratios)
    return Span(
        seconds * math.exp(low), seconds * math.exp(ratios[len(ratios) // 2]), seconds * math.exp(high), len(used)
    )


def spans_left_out(pairs: Sequence[TimePair], known: Sequence[TimePair] = ()) -> list[Span | None]:
    """Each run's interval from the runs of other methods, and of those from `known`; None where they say too little."""
    found: list[Span | None] = []
    for pair in pairs:
        others = [p for p in (*pairs, *known) if p.method != pair.method]
        made = span(pair.forecast, pair.how, pair.device, pair.family, others)
        found.append(made if made.n else None)
    return found


def residuals_of_times(pairs: Sequence[TimePair], known: Sequence[TimePair] = ()) -> Residuals | None:
    """How good these intervals are: each run's is made from the runs of other methods. None where no run has one."""
    judged = [(pair, made) for pair, made in zip(pairs, spans_left_out(pairs, known), strict=True) if made is not None]
    if not judged:
        return None
    n, errors = len(judged), sorted(abs(pair.measured / made.likely - 1) for pair, made in judged)
    return Residuals(
        n=n,
        median_error=errors[n // 2],
        covered=sum(made.low <= pair.measured <= made.high for pair, made in judged) / n,
        above=sum(pair.measured > made.high for pair, made in judged) / n,
    )

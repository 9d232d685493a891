"""A small writer of charts: axes, points with intervals, lines, bars. Colours and sizes of text are the page's own.

A chart is one `<svg>` with a title and a description; what it shows stands in a table of the page too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from luthier.report.html import Html, el, joined

__all__ = ["COLOURS", "Axis", "Chart", "linear", "logarithmic"]

COLOURS = 8
"""Of series; the page's style says which."""
LETTER = 6.2
"""Width of a letter of a label, about."""

# Paths of marks round 0,0; a series is told by its mark as well as by its colour.
MARKS = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-4-4h8v8h-8z", "M0-5l5 9h-10z", "M0-5.5l5 5.5l-5 5.5l-5-5.5z",
    "M0 5l5-9h-10z", "M-5-1.5h3.5v-3.5h3v3.5h3.5v3h-3.5v3.5h-3v-3.5h-3.5z", "M-5 0l2.5-4.5h5l2.5 4.5l-2.5 4.5h-5z",
)  # fmt: skip


@dataclass(frozen=True)
class Axis:
    """Where values stand: `at` gives 0 at the beginning and 1 at the end."""

    at: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]
    name: str = ""


def linear(low: float, high: float, name: str = "", said: Callable[[float], str] | None = None, n: int = 5) -> Axis:
    """An axis whose ends are its first and last tick.

    >>> [said for _, said in linear(0.31, 0.87).ticks]
    ['0.2', '0.4', '0.6', '0.8', '1']
    """
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / n
    size = 10.0 ** math.floor(math.log10(raw))
    step = size * next(m for m in (1, 2, 5, 10) if m * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((i * step, (said or _short)(i * step)) for i in range(first, last + 1))
    start, width = first * step, (last - first) * step
    return Axis(lambda v: (v - start) / width, ticks, name)


def logarithmic(values: Sequence[float], name: str = "", said: Callable[[float], str] | None = None) -> Axis:
    """An axis of powers of ten, or of 1, 2, 5 where they span little; nothing (0) stands apart at its beginning.

    >>> [said for _, said in logarithmic([0, 20, 3000]).ticks]
    ['0', '10', '100', '1000', '10000']
    """
    above = [v for v in values if v > 0] or [1.0]
    zero = 0.14 if min(values, default=1) <= 0 else 0.0
    low, high = math.log10(min(above)), math.log10(max(above))
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    if max(above) < 40 * min(above):
        marks = [m * 10.0**e for e in range(first, max(first + 1, last + 1)) for m in (1, 2, 5)]
        under = [m for m in marks if m <= min(above) * 1.001]
        over = [m for m in marks if m >= max(above) * 0.999]
        marks = [m for m in marks if under[-1] <= m <= (over[0] if over else 10.0 ** (last + 1))]
        if len(marks) == 1:
            marks.append(marks[0] * 2)
    else:
        marks = [10.0**e for e in range(first, last + 1, max(1, (last - first) // 5))]
        if marks[-1] < max(above):
            marks.append(marks[-1] * marks[1] / marks[0])
    start, width = math.log10(marks[0]), math.log10(marks[-1]) - math.log10(marks[0])

    def at(v: float) -> float:
        return zero + (1 - zero) * (math.log10(v) - start) / width if v > 0 else 0.04

    return Axis(at, ((*((0.0, "0"),) * (zero > 0), *((m, (said or _short)(m)) for m in marks))), name)


def _short(value: float) -> str:
    return f"{value:.6g}".removesuffix(".0")


@dataclass
class Chart:
    """One chart in the making: pieces are added, then it is written.

    Attributes:
        title: what it is; `says`: what it shows, for who cannot see it.
        left, bottom: room for the ticks.
    """

    title: str
    says: str
    x: Axis
    y: Axis
    width: int = 460
    height: int = 300
    left: int = 52
    bottom: int = 40
    top: int = 12
    right: int = 14
    pieces: list[Html] = field(default_factory=list)
    taken: list[tuple[float, float, float, float]] = field(default_factory=list)

    def px(self, v: float) -> float:
        """Where a value of the x axis stands."""
        return round(self.left + self.x.at(v) * (self.width - self.left - self.right), 1)

    def py(self, v: float) -> float:
        """Where a value of the y axis stands."""
        return round(self.height - self.bottom - self.y.at(v) * (self.height - self.bottom - self.top), 1)

    def line(self, points: Sequence[tuple[float, float]], style: str, says: str = "", id_: str | None = None) -> None:
        """A line through points; of the class `style`."""
        where = " ".join(f"{_at(self.px(x))},{_at(self.py(y))}" for x, y in points)
        self.pieces.append(el("polyline", *_told(says), points=where, class_=style, id=id_))

    def steps(self, points: Sequence[tuple[float, float]], style: str) -> None:
        """A line that goes on level and then up, as a front does."""
        walked = [points[0]]
        for x, y in points[1:]:
            walked += [(x, walked[-1][1]), (x, y)]
        self.line(walked, style)
        for (x0, y0), (x1, y1) in pairwise(walked):  # no name stands on it
            left, right = self.px(x0), self.px(x1)
            self.taken.append((left, min(self.py(y0), self.py(y1)) - 1, right, max(self.py(y0), self.py(y1)) + 1))

    def interval(self, x: float, low: float, high: float, style: str) -> None:
        """A vertical bar with ends."""
        at, top, end = self.px(x), self.py(high), self.py(low)
        self.pieces.append(el("path", d=f"M{at} {top}V{end}M{at - 3} {top}h6M{at - 3} {end}h6", class_=style))
        self.taken.append((at - 1, top, at + 1, end))

    def mark(self, x: float, y: float, number: int, says: str = "") -> None:
        """The mark of the series of that number."""
        at = f"translate({self.px(x)} {self.py(y)})"
        shape = el("path", d=MARKS[number % len(MARKS)])
        self.pieces.append(el("g", *_told(says), shape, transform=at, class_=f"m c{number % COLOURS}"))
        self.taken.append((self.px(x) - 5, self.py(y) - 5, self.px(x) + 5, self.py(y) + 5))

    def bar(self, x: float, low: float, high: float, width: float, style: str, says: str = "") -> None:
        """An upright bar round x, `width` units of the drawing wide."""
        top, end = self.py(high), self.py(low)
        shape = {"x": round(self.px(x) - width / 2, 1), "y": top, "width": round(width, 1)}
        self.pieces.append(
            el("g", *_told(says), el("rect", **shape, height=round(max(0.0, end - top), 1), class_=style))
        )

    def label(self, x: float, y: float, text: str) -> None:
        """A name beside a point, where nothing else stands; further away where all places near it are taken."""
        at, to = self.px(x), self.py(y)
        wide = LETTER * len(text)
        for away in (9, 14, 24, 36, 50):
            for dx, dy, anchor in (
                (away, 4, "start"), (-away, 4, "end"), (0, -away, "middle"), (0, away + 8, "middle"),
                (away, -away + 4, "start"), (-away, -away + 4, "end"), (away, away + 4, "start"),
                (-away, away + 4, "end"),
            ):  # fmt: skip
                left = at + dx - {"start": 0, "middle": wide / 2, "end": wide}[anchor]
                box = (left, to + dy - 10, left + wide, to + dy + 2)
                inside = box[0] >= self.left and box[2] <= self.width and box[1] >= 0
                if (
                    inside
                    and box[3] <= self.height - self.bottom
                    and not any(_meet(box, other) for other in self.taken)
                ):
                    self._write(at, to, dx, dy, anchor, text, away)
                    self.taken.append(box)
                    return
        # No room at all: the mark's own title and the table have the name.

    def _write(self, at: float, to: float, dx: float, dy: float, anchor: str, text: str, away: int) -> None:
        if away > 14:
            self.pieces.append(el("path", d=f"M{at} {to}L{at + dx * 0.9:.1f} {to + dy * 0.9:.1f}", class_="lead"))
        place = {"x": round(at + dx, 1), "y": round(to + dy, 1), "text_anchor": None if anchor == "start" else anchor}
        self.pieces.append(el("text", text, **place, class_="name"))

    def written(self, key: str, style: str = "chart") -> Html:
        """The chart as an element of the page; no two charts of a page have one key."""
        title, says = el("title", self.title, id=f"{key}-t"), el("desc", self.says, id=f"{key}-d")
        box = f"0 0 {self.width} {self.height}"
        inner = joined(title, says, self._axes(), *self.pieces)
        return el("svg", inner, viewBox=box, role="img", aria_labelledby=f"{key}-t {key}-d", class_=style)

    def _axes(self) -> Html:
        low, end = self.height - self.bottom, self.width - self.right
        lines = "".join(f"M{self.left} {self.py(v)}H{end}" for v, _ in self.y.ticks)
        marks = "".join(f"M{self.px(v)} {low}v4" for v, _ in self.x.ticks)
        said = [el("text", s, x=self.left - 6, y=self.py(v) + 3.5, text_anchor="end") for v, s in self.y.ticks]
        said += [el("text", s, x=self.px(v), y=low + 16, text_anchor="middle") for v, s in self.x.ticks]
        if self.x.name:
            said.append(el("text", self.x.name, x=(self.left + end) / 2, y=self.height - 5, text_anchor="middle"))
        if self.y.name:
            middle = (self.top + low) / 2
            turn = f"translate(11 {middle}) rotate(-90)"
            said.append(el("text", self.y.name, text_anchor="middle", transform=turn))
        axis = el("path", d=f"M{self.left} {low}H{end}{marks}", class_="axis")
        return joined(el("path", d=lines, class_="grid"), axis, *said)


def _told(says: str) -> tuple[Html, ...]:
    return (el("title", says),) if says else ()


def _meet(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _at(value: Any) -> str:
    return f"{value:.1f}".removesuffix(".0")

"""The numbers behind charts and tables: fronts, curves, bins of certainty, confusions, forecasts, disagreements."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from luthier.core import share_interval
from luthier.report.gather import Story
from luthier.report.read import Run

__all__ = [
    "Bin",
    "Confusion",
    "Disagreement",
    "Part",
    "binned",
    "confusion_of",
    "disagreements",
    "forecast_rows",
    "front",
    "reliability_of",
]

BINS = 15
MOST_CLASSES = 12
"""Of a confusion that is drawn; those with the most rows."""
PARTS = ("weights", "trained", "gradients", "optimiser")
"""Counted before and after; activations and what the program takes are counted after only."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Numbers of the points (cost, score) than which none is cheaper and at least as good, cheapest first.

    >>> front([(3, 0.9), (1, 0.5), (2, 0.4)])
    [1, 0]
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] > points[kept[-1]][1]:
            kept.append(i)
    return kept


def binned(curve: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """A curve as at most so many points, each the mean of as many neighbours; values that are no number are left out.

    >>> binned([(1, 4.0), (2, 2.0), (3, 1.0), (4, 1.0)], 2)
    [(1.5, 3.0), (3.5, 1.0)]
    """
    whole = [p for p in curve if math.isfinite(p[1])]
    if not whole:
        return []
    each = -(-len(whole) // most)
    pieces = [whole[i : i + each] for i in range(0, len(whole), each)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in pieces]


@dataclass(frozen=True)
class Bin:
    """Answers of like certainty: how many, how sure on average, and the share that is right with its 95 % interval."""

    rows: int
    sure: float
    right: float
    low: float
    high: float


def reliability_of(runs: Sequence[Run]) -> list[Bin]:
    """Bins of the answers of all runs together; nothing where no run says how sure it is."""
    piles: dict[int, list[tuple[float, bool]]] = {}
    for run in runs:
        if run.answers is None:
            continue
        answers = run.answers
        for sure, wanted, said in zip(answers.sure, answers.wanted, answers.said, strict=False):
            piles.setdefault(min(BINS - 1, int(sure * BINS)), []).append((sure, wanted == said))
    found = []
    for _, pile in sorted(piles.items()):
        right = sum(hit for _, hit in pile)
        low, high = share_interval(right, len(pile))
        found.append(Bin(len(pile), sum(sure for sure, _ in pile) / len(pile), right / len(pile), low, high))
    return found


@dataclass(frozen=True)
class Confusion:
    """Rows of each class (down) by the answer (across), over all runs of a method.

    Attributes:
        others: rows of a class that were answered with a class that is not drawn.
        left_out: how many classes are not drawn.
    """

    classes: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]
    others: tuple[int, ...]
    left_out: int

    def worst(self, most: int = 5) -> list[tuple[str, str, int, int]]:
        """(wanted, answered, rows, rows of the class) of the largest mistakes."""
        found = [
            (name, self.classes[j], self.counts[i][j], sum(self.counts[i]) + self.others[i])
            for i, name in enumerate(self.classes)
            for j in range(len(self.classes))
            if i != j and self.counts[i][j]
        ]
        return sorted(found, key=lambda row: (-row[2], row[0], row[1]))[:most]

    def says(self) -> str:
        """In words."""
        mistakes = "; ".join(f"{w} answered {a}: {n} of {of}" for w, a, n, of in self.worst())
        return f"Most often mixed up: {mistakes}." if mistakes else "No row of these classes is answered wrongly."


def confusion_of(runs: Sequence[Run]) -> Confusion | None:
    """The confusion of all runs together; None where rows have no one label."""
    whole = [run for run in runs if run.answers is not None and (run.quality or {}).get("confusion")]
    if not whole:
        return None
    cells = Counter(
        pair for run in whole if run.answers for pair in zip(run.answers.wanted, run.answers.said, strict=True)
    )
    rows = Counter[str]()
    for (wanted, said), n in cells.items():
        rows[wanted] += n
        rows[said] += 0
    shown = sorted(sorted(rows), key=lambda name: -rows[name])[:MOST_CLASSES]
    shown.sort()
    counts = tuple(tuple(cells[wanted, said] for said in shown) for wanted in shown)
    others = tuple(rows[name] - sum(own) for name, own in zip(shown, counts, strict=True))
    return Confusion(tuple(shown), counts, others, len(rows) - len(shown))


@dataclass(frozen=True)
class Part:
    """Bytes of one part of one run: as forecast, and as counted."""

    run: str
    method: str
    part: str
    forecast: int
    measured: int


def forecast_rows(story: Story) -> list[Part]:
    """What was forecast of each run, and what came of it."""
    return [
        Part(run.name, run.method, part, run.record.forecast[part], run.record.memory[part])
        for run in story.runs
        if run.record is not None
        for part in PARTS
        if part in run.record.forecast and part in run.record.memory
    ]


@dataclass(frozen=True)
class Disagreement:
    """A row that is not answered alike, or wrongly by the only run."""

    place: str
    text: str
    wanted: str
    said: tuple[tuple[str, tuple[str, ...]], ...]
    """(answer, names of the runs that gave it), the most frequent first"""
    sure: float | None = None
    """of the only run"""


def disagreements(story: Story) -> list[Disagreement]:
    """Rows on which runs disagree, the most evenly divided first; of one run its mistakes, the surest first.

    Of a cross-validation the runs of each fold stand by themselves; else runs with other rows than the first are left.
    """
    runs = [run for run in story.runs if run.answers is not None and (run.quality or {}).get("confusion")]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.answers is not None:
            groups.setdefault(tuple(run.answers.places), []).append(run)
    kept = list(groups.values()) if story.comparison is not None and story.comparison.folds else [*groups.values()][:1]
    found = [one for group in kept for one in _disagreements(group)]
    return [one for *_, one in sorted(found, key=lambda item: item[:3])]


def _disagreements(runs: Sequence[Run]) -> Iterator[tuple[float, float, int, Disagreement]]:
    """Of runs with the same rows, with what they are sorted by."""
    first = runs[0].answers
    assert first is not None
    for row, wanted in enumerate(first.wanted):
        given: dict[str, list[str]] = {}
        for run in runs:
            assert run.answers is not None
            given.setdefault(run.answers.said[row], []).append(run.name)
        right = len(given.get(wanted, ()))
        if len(given) == 1 and (len(runs) > 1 or right):
            continue
        said = sorted(given.items(), key=lambda item: (-len(item[1]), item[0]))
        sure = first.sure[row] if len(runs) == 1 and first.sure else None
        one = Disagreement(first.places[row], first.texts[row], wanted, tuple((a, tuple(r)) for a, r in said), sure)
        yield -(sure or 0.0), abs(right / len(runs) - 0.5), row, one

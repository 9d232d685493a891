"""Who is right how often, and what may be said of it: the statistics of `luthier compare`, with a guess beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.asking.engine import Of
from luthier.asking.finals import normalised_answer
from luthier.comparison.scores import score_named
from luthier.comparison.statistics import Difference, flips, mcnemar, resample, smallest_visible
from luthier.core import listed
from luthier.data.near_copies import clusters

__all__ = ["METRICS", "Pair", "Standing", "Standings", "judged"]

METRICS = {"labels": ("accuracy", "macro_f1", "mcc"), "texts": ("accuracy", "f1")}
"""accuracy of texts: the same final answer; f1: of words, for longer texts"""
PARTS = 10_000


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One way: its score, a mean over seeds, with a 95 % interval, and what it cost."""

    name: str
    score: float
    low: float
    high: float
    scores: tuple[float, ...]
    above_guess: tuple[float, float, float]
    """its score minus the guess's, with the ends of the 95 % interval"""
    unanswered: int
    """rows without an answer, over all seeds"""
    requests: int
    read: int
    computed: int
    written: int
    seconds: float
    """costs are means over seeds"""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two ways on the same rows: the first one's score minus the second's."""

    first: str
    second: str
    difference: Difference
    flips: tuple[int, int]
    """rows of the first seed that only the first has right, and only the second"""
    mcnemar: float


@dataclass(frozen=True, kw_only=True)
class Standings:
    """All ways, best first, beside the guess that names the commonest answer of the rows that may be shown."""

    metric: str
    rows: int
    seeds: tuple[int, ...]
    standings: tuple[Standing, ...]
    pairs: tuple[Pair, ...]
    guess: str
    guess_score: float
    visible: float
    """difference in accuracy that these rows show in 8 of 10 races, where two ways differ on a tenth of them"""
    findings: tuple[str, ...]


def judged(
    names: Sequence[str], runs: Sequence[Of], wanted: Sequence[str], texts: Sequence[str], *, labels: Sequence[str],
    common: str, metric: str, seeds: Sequence[int],
) -> Standings:  # fmt: skip
    """Score what all ways answered, and say what the differences are worth."""
    told, right, score = _numbers(names, runs, wanted, labels, common, metric, seeds)
    near = _copies(texts, bool(labels))
    found = resample(score, right, told, near)  # the last of the ways is the guess
    guess = len(names)
    order = sorted(range(len(names)), key=lambda i: -float(found.scores[i].mean()))
    standings = []
    for i in order:
        low, high = found.interval(i)
        gap = found.difference(i, guess)
        own = [run for run in runs if run.name == names[i]]
        standings.append(
            Standing(
                name=names[i],
                score=float(found.scores[i].mean()),
                low=low,
                high=high,
                scores=tuple(float(v) for v in found.scores[i]),
                above_guess=(gap.value, gap.low, gap.high),
                unanswered=sum(one.answer.said is None for run in own for one in run.told),
                requests=_mean(run.cost.requests for run in own),
                read=_mean(run.cost.read for run in own),
                computed=_mean(run.cost.computed for run in own),
                written=_mean(run.cost.written for run in own),
                seconds=sum(run.cost.seconds for run in own) / len(own),
            )
        )
    pairs = [
        _pair(names, found.difference(a, b), told[a, 0] == right, told[b, 0] == right, a, b)
        for n, a in enumerate(order)
        for b in order[n + 1 :]
    ]
    made = Standings(
        metric=metric, rows=len(wanted), seeds=tuple(seeds), standings=tuple(standings), pairs=tuple(pairs),
        guess=common, guess_score=float(found.scores[guess].mean()), visible=smallest_visible(int(near.max()) + 1),
        findings=(),
    )  # fmt: skip
    return Standings(**{**vars(made), "findings": tuple(_findings(made))})


def _mean(numbers: Iterable[int]) -> int:
    values = list(numbers)
    return round(sum(values) / len(values))


def _copies(texts: Sequence[str], labelled: bool) -> NDArray[np.int64]:
    """Numbers of rows, the same for near copies. Sums that differ in their numbers alone are no copies."""
    if labelled:
        return clusters(texts)
    known: dict[str, int] = {}
    return np.array([known.setdefault(text.strip().lower(), len(known)) for text in texts], dtype=np.int64)


def _pair(
    names: Sequence[str], difference: Difference, first: NDArray[Any], second: NDArray[Any], a: int, b: int
) -> Pair:
    told = flips(first, second)
    return Pair(first=names[a], second=names[b], difference=difference, flips=told, mcnemar=mcnemar(*told))


def _numbers(
    names: Sequence[str], runs: Sequence[Of], wanted: Sequence[str], labels: Sequence[str], common: str, metric: str,
    seeds: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64], Any]:  # fmt: skip
    """Answers (ways and the guess, seeds, rows) and what is right (rows,) as numbers, and what scores them."""
    of = {(run.name, run.seed): [one.answer.said for one in run.told] for run in runs}
    said = [[of[name, seed] for seed in seeds] for name in names] + [[[common] * len(wanted) for _ in seeds]]
    if labels:
        number: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
        told = [[[number.get(a, len(labels)) for a in run] for run in way] for way in said]  # no answer is no label
        return np.array(told), np.array([number[label] for label in wanted]), score_named(metric)
    if metric == "accuracy":
        right = [normalised_answer(text) for text in wanted]
        told = [
            [[int(a is not None and normalised_answer(a) == w) for a, w in zip(run, right, strict=True)] for run in way]
            for way in said
        ]
        return np.array(told), np.ones(len(wanted), dtype=np.int64), score_named("accuracy")
    told = [
        [[round(PARTS * _word_f1(a or "", w)) for a, w in zip(run, wanted, strict=True)] for run in way] for way in said
    ]
    return np.array(told), np.full(len(wanted), PARTS), _mean_share


def _mean_share(wanted: NDArray[np.int64], said: NDArray[np.int64], weights: NDArray[np.float64]) -> float:
    return float((said * weights).sum() / (PARTS * weights.sum()))


def _word_f1(said: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words of two texts, each counted as often as it stands there."""
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (said, wanted))
    shared = sum((a & b).values())
    return 2 * shared / (sum(a.values()) + sum(b.values())) if shared else 0.0


def _findings(found: Standings) -> list[str]:
    first = found.standings[0]
    metric = found.metric.replace("_", " ")
    lines = []
    gain, low, _ = first.above_guess
    guess = f"always answering {found.guess[:40]!r}"
    if gain <= 0:
        lines.append(
            f"No result: nothing beats {guess}, whose {metric} on these rows is {found.guess_score:.3f}; the best, "
            f"{first.name}, has {first.score:.3f}. Try a larger model, other words or another template, or train one."
        )
    elif low <= 0:
        lines.append(
            f"No result: {first.name} is not told apart from {guess} by these rows ({first.score:.3f} against "
            f"{found.guess_score:.3f}). Ask about more rows (--rows), or a larger model."
        )
    seeds = f"{len(found.seeds)} seeds" if len(found.seeds) > 1 else "one seed"
    lines.append(
        f"{first.name} has the highest {metric}, {first.score:.3f} ({first.low:.3f} to {first.high:.3f}), on "
        f"{found.rows} rows and {seeds}."
    )
    for pair in [pair for pair in found.pairs if pair.first == first.name]:
        gap = pair.difference
        apart = "above" if gap.low > 0 else "not told apart from"
        value = f"{gap.value:+.3f}, {gap.low:+.3f} to {gap.high:+.3f}"
        lines.append(
            f"{pair.first} is {apart} {pair.second} on these rows and {seeds} ({value}; right alone in "
            f"{pair.flips[0]} and {pair.flips[1]} rows of the first seed, exact McNemar test: p = {pair.mcnemar:.2g})."
        )
    if len(found.standings) > 2:
        lines.append(
            "These intervals are not corrected for how many ways there are: the best was chosen on these rows."
        )
    if len(found.seeds) < 5:
        lines.append(
            f"Other rows shown give other scores, and {seeds} {'say' if len(found.seeds) > 1 else 'says'} little of "
            "that: --seeds 5."
        )
    silent = [f"{s.name} {s.unanswered}" for s in found.standings if s.unanswered]
    if silent:
        lines.append(f"Rows without an answer, which count as wrong: {listed(silent)}.")
    return lines

"""From the answers of all runs to what may be said: who is best, who ties, what cannot be told, and at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from luthier.comparison.rates import Rates
from luthier.comparison.scores import LEAST, score_named
from luthier.comparison.statistics import (
    LEAST_SEEDS,
    Difference,
    Score,
    flips,
    mcnemar,
    resample,
    smallest_visible,
)
from luthier.core import human_count, listed

__all__ = ["Comparison", "Costs", "Standing", "judge"]

LEAST_MARGIN = 0.01
Word = Literal["best", "ties", "worse", "not told apart"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What one method costs; means over its seeds, and the highest peak."""

    trained: int
    seconds: float
    peak_bytes: int | None
    stored_bytes: int


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One method in the found."""

    name: str
    score: float
    """mean over seeds"""
    scores: tuple[float, ...]
    low: float
    high: float
    """95 % interval of the mean"""
    word: Word
    """against the best"""
    difference: Difference | None
    """from the best; None for the best itself"""
    p: float = 1.0
    """of the difference, corrected for the best having been found on the same rows"""
    flips: tuple[tuple[int, int], ...] = ()
    """for each seed: rows that only the best answers rightly, rows that only this one does"""
    mcnemar: tuple[float, ...] = ()
    """exact p-value of each seed's flips"""
    calibration_error: float | None = None
    """mean gap between how sure answers are and how often they are right"""
    brier: float | None = None
    nll: float | None = None
    temperature: float | None = None
    calibrated_calibration_error: float | None = None
    calibrated_brier: float | None = None
    calibrated_nll: float | None = None
    """as in `luthier.training.quality.Quality`; means over seeds"""
    fold_scores: tuple[float, ...] = ()
    """of each fold's rows, means over seeds; empty where there are no folds"""
    costs: Costs


@dataclass(frozen=True, kw_only=True)
class RaceTold:
    """How a race was asked for. Plain values only.

    Attributes:
        methods: as they were named.
        rates: that were tried of each; None where nobody said how many.
        given: lr and head_lr of the command; None for each method's own.
        minutes, memory: what it might take; None where nothing was said.
    """

    methods: tuple[str, ...]
    rates: int | None
    given: tuple[float | None, float | None]
    minutes: float | None
    memory: int | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A finished found. Plain values only."""

    metric: str
    rows: int
    seeds: tuple[int, ...]
    margin: float
    standings: tuple[Standing, ...]
    """best first"""
    baselines: dict[str, float]
    """name -> score on the same rows"""
    failed: dict[str, str]
    """method -> why it has no result"""
    visible: float
    """difference in accuracy that these rows show in 8 of 10 races, where methods differ on a tenth of them"""
    optimism: float
    """what the best one's score owes to having been chosen on these rows"""
    findings: tuple[str, ...] = field(default=())
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """method -> its runs by seed: folders below that of the comparison"""
    rates: dict[str, Rates] = field(default_factory=dict)
    """method -> the learning rates that were tried for it, where they were searched"""
    margin_given: bool = False
    """by the user; else it is made of the spread over seeds"""
    params: int | None = None
    """numbers that a method might train beside the head, where sizes were chosen by that"""
    folds: int = 0
    """of a cross-validation: each row was answered by the runs that had not learnt it; 0 where there is none"""
    fold_rates: tuple[dict[str, Rates], ...] = ()
    """the same as `rates`, for each fold, chosen on rows that its runs have learnt"""
    race: RaceTold | None = None
    """what was raced for the one method that has runs here"""


def judge(
    names: Sequence[str],
    answered: NDArray[np.int64],
    wanted: NDArray[np.int64],
    clusters: NDArray[np.int64],
    *,
    seeds: Sequence[int],
    metric: str,
    margin: float | None,
    costs: Sequence[Costs],
    calibration: Sequence[Mapping[str, float]] | None = None,
    baselines: dict[str, NDArray[np.int64]],
    failed: dict[str, str],
    folds: NDArray[np.int64] | None = None,
) -> Comparison:
    """Judge what all methods answered on the same rows.

    Args:
        answered: (methods, seeds, rows) numbers of classes; wanted: (rows,).
        clusters: (rows,) rows of one number are near copies of each other.
        margin: differences below it do not matter; None takes twice the methods' spread over seeds, a hundredth at
            least.
        calibration: of each method what `Standing` has of certainty, as far as it is known.
        baselines: name -> (rows,) answers.
        folds: (rows,) number of the fold that each row is in, where there are folds.
    """
    score = score_named(metric)
    resampled = resample(score, wanted, answered, clusters, folds=folds)
    means = resampled.scores.mean(axis=1)
    best = int(means.argmax())
    order = [int(i) for i in np.argsort(-means, kind="stable")]
    given = margin is not None
    if margin is None:
        # Of the middle one: three seeds of one method say little, and one unsteady method must not widen it for all.
        spread = float(np.sqrt(np.median(resampled.scores.var(axis=1, ddof=1)))) if len(seeds) > 1 else 0.0
        margin = max(2 * spread, LEAST_MARGIN)
    others = [i for i in order if i != best]
    differences = {i: resampled.difference(i, best) for i in others}
    corrected = dict(enumerate(resampled.beside_the_best(best)))
    if resampled.over_seeds:  # a claim over seeds needs the signs of their differences to agree
        corrected |= {i: max(corrected[i], d.p_seeds) for i, d in differences.items()}
    standings = []
    for i in order:
        low, high = np.clip(resampled.interval(i), LEAST.get(metric, 0.0), 1.0)
        right = answered == wanted
        told = [flips(right[best, s], right[i, s]) for s in range(len(seeds))] if i != best else []
        standings.append(
            Standing(
                name=names[i],
                score=float(means[i]),
                scores=tuple(float(v) for v in resampled.scores[i]),
                low=float(low),
                high=float(high),
                word=_word(differences[i], corrected[i], margin, given, len(seeds)) if i != best else "best",
                difference=differences.get(i),
                p=corrected[i],
                flips=tuple(told),
                mcnemar=tuple(mcnemar(*pair) for pair in told),
                **(calibration[i] if calibration is not None else {}),
                fold_scores=_by_fold(score, wanted, answered[i], folds),
                costs=costs[i],
            )
        )
    every = np.ones(len(wanted))
    beside = {name: float(score(wanted, said, every)) for name, said in baselines.items()}
    made = Comparison(
        metric=metric, rows=len(wanted), seeds=tuple(seeds), margin=margin, standings=tuple(standings),
        baselines=beside, failed=failed, visible=smallest_visible(int(clusters.max()) + 1),
        optimism=resampled.optimism() if len(names) > 1 else 0.0, margin_given=given,
        folds=0 if folds is None else int(folds.max()) + 1,
    )  # fmt: skip
    return Comparison(**{**vars(made), "findings": tuple(_findings(made))})


def _by_fold(
    score: Score, wanted: NDArray[np.int64], answered: NDArray[np.int64], folds: NDArray[np.int64] | None
) -> tuple[float, ...]:
    """The mean score over seeds on the rows of each fold; `answered` is (seeds, rows)."""
    if folds is None:
        return ()
    parts = [np.flatnonzero(folds == fold) for fold in range(int(folds.max()) + 1)]
    return tuple(
        float(np.mean([score(wanted[part], said[part], np.ones(len(part))) for said in answered])) for part in parts
    )


def _word(difference: Difference, p: float, margin: float, given: bool, seeds: int) -> Word:
    if seeds == 1:  # what another draw would change is not known; the very same answers are the same with any
        return "ties" if difference.low == difference.high == 0 else "not told apart"
    # A difference that is seen is called equal only on the user's word that it does not matter.
    if (given or p >= 0.05) and -margin < difference.low90 and difference.high90 < margin:
        return "ties"
    return "worse" if p < 0.05 else "not told apart"


def _findings(found: Comparison) -> list[str]:
    first, rest = found.standings[0], found.standings[1:]
    metric, several = found.metric.replace("_", " "), len(found.seeds) > 1
    lines = []
    above = {name: value for name, value in found.baselines.items() if value >= first.score}
    if above:
        name = max(above, key=lambda n: above[n])
        lines.append(
            f"No method beats {name}, whose {metric} on these rows is {above[name]:.3f}; the best, {first.name}, has "
            f"{first.score:.3f}. Train longer, with other rates, or on more rows."
        )
    seeds = f"{len(found.seeds)} seeds" if several else "one seed"
    lines.append(
        f"{first.name} has the highest {metric}, {first.score:.3f} ({first.low:.3f} to {first.high:.3f}), on "
        f"{found.rows} rows and {seeds}."
    )
    for word, says in (
        ("ties", f"within {found.margin:.3f} of it, so they tie"),
        (
            "not told apart",
            "not told apart from it by these rows and seeds" if several else "not told apart from it by one seed",
        ),
        ("worse", "worse than it" if len(found.seeds) >= LEAST_SEEDS else "worse than it on these seeds"),
    ):
        named = [s.name for s in rest if s.word == word]
        if named:
            one = says.replace("so they tie", "so it ties") if len(named) == 1 else says
            lines.append(f"{listed(named)} {'is' if len(named) == 1 else 'are'} {one}.")
    lines += _of_folds(found) if found.folds else []
    lines += [] if several else _of_one_seed(found)
    lines += _advice(found)
    if len(found.seeds) < LEAST_SEEDS:
        lines.append(
            f"Whether this order holds over other seeds cannot be told from {seeds}: it takes {LEAST_SEEDS} "
            f"(--seeds {LEAST_SEEDS})."
        )
    if found.optimism > 0.0005:
        lines.append(
            f"The best of {len(found.standings)} was chosen on these rows: on others expect about "
            f"{first.score - found.optimism:.3f}."
        )
    for name, why in found.failed.items():
        lines.append(f"{name} has no result: {why}")
    return lines


def _of_folds(found: Comparison) -> list[str]:
    """How the differences spread over the folds, and what no fold can show."""
    first, rest = found.standings[0], found.standings[1:]
    ahead = [
        f"{s.name} in {sum(a > b for a, b in zip(first.fold_scores, s.fold_scores, strict=True))}" for s in rest[:5]
    ]
    lines = [
        f"Each row was answered by runs of {found.folds} folds that had learnt neither it nor a near copy. Rows are "
        "taken to be draws of their own, and so is each run's chance; that the runs of two folds have learnt most rows "
        "in common is not counted: this is of methods on these rows, and other rows to learn from may turn it."
    ]
    return [*lines, f"Of the {found.folds} folds {first.name} is ahead of {listed(ahead)}."] if ahead else lines


def _of_one_seed(found: Comparison) -> list[str]:
    """What one seed does show: two trained models on the same rows, of which the methods are not to blame alone."""
    first, rest = found.standings[0], found.standings[1:]
    return [
        f"On these rows {first.name} alone is right in {s.flips[0][0]}, {s.name} alone in {s.flips[0][1]} (exact "
        f"McNemar test: p = {s.mcnemar[0]:.2g}). That is of these two trained models; another seed makes others."
        for s in rest[:3]
        if s.flips and sum(s.flips[0])
    ]


def _advice(found: Comparison) -> list[str]:
    """Among methods that tie, the one that trains least."""
    first = found.standings[0]
    equal = [s for s in found.standings if s.word in ("best", "ties")]
    least = min(equal, key=lambda s: s.costs.trained)
    if least.name == first.name or least.costs.trained == 0:
        return []
    times = first.costs.trained / least.costs.trained
    if times < 1.1:
        return []
    return [
        f"Of those that tie, {least.name} trains {times:.1f} times fewer numbers than {first.name} "
        f"({human_count(least.costs.trained)} against {human_count(first.costs.trained)})."
    ]

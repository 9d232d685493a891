"""What a difference between two methods is worth: intervals, exact tests, ties and what could have been seen.

Every method answers the same held-out rows, once for each seed, so differences are paired row by row. Resamples are
drawn once and used for all methods: what is said of one pair agrees with what is said of another.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from luthier.comparison.scores import accuracy
from luthier.core import key

__all__ = [
    "LEAST_SEEDS",
    "Difference",
    "Resampled",
    "flips",
    "mcnemar",
    "resample",
    "sign_flip",
    "smallest_visible",
]

Score = Callable[[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]], float]
"""(wanted, answered, weight of each row) -> score; wanted and answered hold numbers of classes"""

DRAWS = 2000
BLOCKS = 200
"""At most so many leave-one-out scores for the skewness of an interval."""
LEAST_SEEDS = 6
"""With five, the smallest p-value of a sign-flip test is 1/16: no claim over seeds can be made."""


@dataclass(frozen=True, kw_only=True)
class Resampled:
    """Scores of every method and seed: as they are, in each resample of rows, and with each block of rows left out."""

    scores: NDArray[np.float64]
    """(methods, seeds)"""
    draws: NDArray[np.float64]
    """(methods, draws): mean over seeds; rows are drawn again, and the seeds' spread is added with its own error"""
    again: NDArray[np.float64]
    """(methods, draws): the same with the spread taken as known, whose means exist for two seeds too"""
    left_out: NDArray[np.float64]
    """(methods, blocks): mean over seeds"""
    over_seeds: bool

    def difference(self, a: int, b: int, p_seeds: bool = True) -> Difference:
        """Method `a` minus method `b`."""
        value = float(self.scores[a].mean() - self.scores[b].mean())
        draws = self.draws[a] - self.draws[b]
        left_out = self.left_out[a] - self.left_out[b]
        below, above = int((draws <= 0).sum()), int((draws >= 0).sum())
        return Difference(
            value=value,
            low=_bca(draws, value, left_out, 0.025),
            high=_bca(draws, value, left_out, 0.975),
            low90=_bca(draws, value, left_out, 0.05),
            high90=_bca(draws, value, left_out, 0.95),
            p=min(1.0, 2 * (min(below, above) + 1) / (len(draws) + 1)),
            p_seeds=sign_flip(self.scores[a] - self.scores[b]) if p_seeds else 1.0,
        )

    def interval(self, method: int) -> tuple[float, float]:
        """95 % interval of one method's mean score."""
        value = float(self.scores[method].mean())
        low, high = (_bca(self.draws[method], value, self.left_out[method], q) for q in (0.025, 0.975))
        return low, high

    def optimism(self) -> float:
        """How much the best of the methods gains by having been chosen on these very rows.

        In each resample the best is chosen anew, and what it loses on all rows is the price of the choice.
        """
        chosen = self.again.argmax(axis=0)
        gained = self.again[chosen, np.arange(self.again.shape[1])] - self.scores.mean(axis=1)[chosen]
        return max(0.0, float(gained.mean()))

    def beside_the_best(self, best: int) -> list[float]:
        """p-value of each method's distance from the best, corrected for the best having been found on these rows.

        If all were equal, the largest distance between any two would be as large in so many of the resamples. Holm's
        steps over the comparisons with the best would not do: which one is the best was read from the same scores, and
        of ten equal methods it lies far from the last by chance alone. Distances are in units of their own spread.
        """
        means = self.scores.mean(axis=1)
        off = self.draws - means[:, None]
        largest = np.zeros(off.shape[1])
        for one in range(len(means) - 1):
            apart = off[one] - off[one + 1 :]
            largest = np.maximum(largest, _in_spreads(apart, apart).max(axis=0))
        found = []
        for i in range(len(means)):
            distance = np.array([[means[best] - means[i]]])
            seen = float(_in_spreads(distance, (off[best] - off[i])[None])[0, 0])
            found.append((int((largest >= seen).sum()) + 1) / (len(largest) + 1) if i != best else 1.0)
        return found


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One method's score minus another's, on the same rows."""

    value: float
    low: float
    high: float
    """95 % interval"""
    low90: float
    high90: float
    """inside the margin on both sides, the two are equal (two one-sided tests at 5 %)"""
    p: float
    """two-sided, over rows and, where there are several, seeds"""
    p_seeds: float
    """two-sided, by flipping the signs of the seeds' differences"""


def resample(
    score: Score, wanted: NDArray[np.int64], answered: NDArray[np.int64], clusters: NDArray[np.int64], seed: int = 0,
    folds: NDArray[np.int64] | None = None,
) -> Resampled:  # fmt: skip
    """Score every method and seed on the rows and on resamples of them.

    Args:
        wanted: (rows,) numbers of classes.
        answered: (methods, seeds, rows).
        clusters: (rows,) rows of one number are near copies and are drawn together. Where all are copies of one
            row, each is drawn alone: there is nothing else to draw.
        folds: (rows,) of a cross-validation: rows of one number were answered by the same run of a method and seed,
            those of another by another run, whose draws are its own. None where one run answered all.

    Rows are drawn with replacement. Seeds are few: drawn so, six of them would understate their spread by a tenth and
    two by a third. Their deviations are mixed with random weights instead, the same for all methods, such that any
    difference of means is spread as Student's t says. With folds the deviations are those of runs of the same fold,
    each by what it moves the score of all rows, and there are (seeds - 1) degrees of freedom in each fold.
    """
    n_methods, n_seeds, n_rows = answered.shape
    if int(clusters.max()) == 0:
        clusters = np.arange(n_rows)
    n_clusters = int(clusters.max()) + 1
    generator = np.random.Generator(np.random.Philox(key("comparison", seed)))
    every = np.ones(n_rows)

    share_right = (answered == wanted).mean(axis=1)  # (methods, rows)

    def mean_scores(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        if score is accuracy:  # a mean over rows: the same to rounding, and most of the time of a large comparison
            return np.asarray(share_right @ weights / weights.sum())
        found = [[score(wanted, answered[m, s], weights) for s in range(n_seeds)] for m in range(n_methods)]
        return np.asarray(np.array(found).mean(axis=1))

    scores = np.array([[score(wanted, row, every) for row in method] for method in answered])
    drawn = np.empty((n_methods, DRAWS))
    for number in range(DRAWS):
        times = np.bincount(generator.integers(0, n_clusters, n_clusters), minlength=n_clusters)
        drawn[:, number] = mean_scores(times[clusters].astype(np.float64))
    if folds is None:
        moved = (scores - scores.mean(axis=1, keepdims=True))[:, None]
    else:
        moved = np.array([_moved(lambda said: score(wanted, said, every), method, folds) for method in answered])
    between, uncertain = _of_runs(moved, generator)
    blocks = np.array_split(generator.permutation(n_clusters), min(BLOCKS, n_clusters))
    left_out = np.empty((n_methods, len(blocks)))
    for number, block in enumerate(blocks):
        kept = (~np.isin(clusters, block)).astype(np.float64)
        left_out[:, number] = mean_scores(kept if kept.any() else every)  # of one row nothing can be left out
    return Resampled(
        scores=scores, draws=drawn + between * uncertain, again=drawn + between, left_out=left_out,
        over_seeds=n_seeds >= LEAST_SEEDS,
    )  # fmt: skip


def _of_runs(
    moved: NDArray[np.float64], generator: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What other runs would add to the means: normal, (methods, draws), and what makes Student's t of it, (draws,).

    Args:
        moved: (methods, folds, seeds) how far each run moves the score of all rows from the mean of the seeds.
    """
    n_methods, n_folds, n_seeds = moved.shape
    if n_seeds == 1:  # one seed shows no spread: what is said is of its rows alone
        return np.zeros((n_methods, DRAWS)), np.ones(DRAWS)
    runs = n_folds * n_seeds
    mixed = moved.reshape(n_methods, runs) @ generator.standard_normal((runs, DRAWS))
    free = n_folds * (n_seeds - 1)
    known = np.sqrt(generator.chisquare(free, DRAWS) / free)
    return mixed / math.sqrt(n_seeds * (n_seeds - 1)), 1 / known


def _moved(
    score: Callable[[NDArray[np.int64]], float], answered: NDArray[np.int64], folds: NDArray[np.int64]
) -> NDArray[np.float64]:
    """How far each run of one method moves the score of all rows, (folds, seeds).

    That of fold f and seed s: the score of all rows with the answers of s in f, a mean over the seeds whose answers
    stand in the other folds, less the mean over s. Of an accuracy that is its own deviation times its share of rows.

    Args:
        answered: (seeds, rows).
    """
    n_seeds, n_folds = len(answered), int(folds.max()) + 1
    found = np.empty((n_folds, n_seeds))
    for fold in range(n_folds):
        inside = folds == fold
        for one in range(n_seeds):
            found[fold, one] = np.mean([score(np.where(inside, answered[one], rest)) for rest in answered])
    return np.asarray(found - found.mean(axis=1, keepdims=True))


def _in_spreads(values: NDArray[np.float64], off: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sizes in units of the half-width that holds 68 % of the deviations `off`; 0 where both are nothing."""
    spread = np.quantile(np.abs(off), 0.6827, axis=1, keepdims=True)
    sizes = np.abs(values)
    return np.where(sizes > 0, sizes / np.where(spread > 0, spread, 1e-12), 0.0)


def _bca(draws: NDArray[np.float64], value: float, left_out: NDArray[np.float64], share: float) -> float:
    """One end of a bootstrap interval, corrected for bias and skewness (Efron 1987)."""
    normal = NormalDist()
    below = (float((draws < value).sum()) + 0.5 * float((draws == value).sum())) / len(draws)
    bias = normal.inv_cdf(min(max(below, 1 / (len(draws) + 1)), len(draws) / (len(draws) + 1)))
    off = left_out.mean() - left_out
    spread = float((off**2).sum()) ** 1.5
    skew = float((off**3).sum()) / (6 * spread) if spread > 0 else 0.0
    z = bias + normal.inv_cdf(share)
    return float(np.quantile(draws, normal.cdf(bias + z / (1 - skew * z))))


def flips(a: ArrayLike, b: ArrayLike) -> tuple[int, int]:
    """Rows that only the first has right, and rows that only the second has.

    Args:
        a, b: (rows,) whether each row's answer is right.
    """
    one, other = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    return int((one & ~other).sum()), int((other & ~one).sum())


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value: of the rows on which two methods differ, half are each one's if they are equally good.

    >>> round(mcnemar(1, 9), 4)
    0.0215
    """
    n, least = only_a + only_b, min(only_a, only_b)
    return min(1.0, float(2 * sum(math.comb(n, k) for k in range(least + 1)) / 2**n))


def sign_flip(differences: NDArray[np.float64]) -> float:
    """Two-sided p-value of a mean over seeds: the share of all sign patterns whose mean is as far from zero.

    >>> sign_flip(np.array([0.1, 0.2, 0.1, 0.3, 0.2, 0.1]))
    0.03125
    """
    n = len(differences)
    if n > 16:
        generator = np.random.Generator(np.random.Philox(key("sign flip", n)))
        signs = generator.choice([-1.0, 1.0], size=(2**16, n))
    else:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)  # (patterns, seeds)
    means = np.abs(signs @ differences) / n
    return float((means >= abs(float(differences.mean())) * (1 - 1e-12)).mean())


def smallest_visible(n_rows: int, differ: float = 0.1) -> float:
    """The difference in accuracy that a test over so many rows finds in 8 of 10 races, at the 5 % level.

    Args:
        differ: share of the rows on which only one of two methods is right.

    >>> round(smallest_visible(1000), 3)
    0.028
    """
    z = NormalDist()
    return min(1.0, (z.inv_cdf(0.975) + z.inv_cdf(0.8)) * math.sqrt(differ / n_rows))

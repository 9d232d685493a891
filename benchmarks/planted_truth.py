"""Races whose truth is planted, through the code that judges real ones: is what `luthier compare` says right?

    python -m benchmarks.planted_truth               every kind of race a hundred times, against its bar
    python -m benchmarks.planted_truth --races 400   more of them
    python -m benchmarks.planted_truth --page        also writes the table of docs/howto/compare.md

A row has a difficulty that all runs share, a run adds noise of its own to each row and moves its method's chance of
being right a little. So rows are hard for all, seeds differ, and the truth is the chance that was put in.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from luthier.comparison.verdict import Comparison, Costs, Standing, judge
from luthier.data.near_copies import clusters

CLASSES = 6
PAGE = Path(__file__).parent.parent / "docs" / "howto" / "compare.md"
BEGIN, END = "<!-- begin planted_truth -->\n", "<!-- end planted_truth -->\n"
Answers = NDArray[np.int64]
Race = Callable[[np.random.Generator], bool]


def answers(
    draw: np.random.Generator, chances: list[float], *, rows: int, seeds: int, noise: float = 0.05,
    between: float = 0.005,
) -> tuple[Answers, Answers]:  # fmt: skip
    """Wanted classes, (rows,), and answers, (methods, seeds, rows).

    Args:
        chances: of each method to be right.
        noise: share of a row's difficulty that each run draws for itself; 0.05 lets 6 % of the answers differ.
        between: how far seeds move a method's chance, as a standard deviation.
    """
    normal = NormalDist()
    wanted = draw.integers(0, CLASSES, rows)
    hard = draw.standard_normal(rows)
    made = np.empty((len(chances), seeds, rows), dtype=np.int64)
    for method, chance in enumerate(chances):
        for seed in range(seeds):
            felt = np.sqrt(1 - noise) * hard + np.sqrt(noise) * draw.standard_normal(rows)
            of_run = min(max(chance + between * draw.standard_normal(), 0.001), 0.999)
            made[method, seed] = np.where(felt < normal.inv_cdf(of_run), wanted, (wanted + 1) % CLASSES)
    return wanted, made


def judged(
    wanted: Answers, made: Answers, clusters: Answers | None = None, margin: float | None = None,
    folds: Answers | None = None,
) -> Comparison:  # fmt: skip
    """The verdict on methods called m0, m1, ..."""
    n, costs = len(made), Costs(trained=1, seconds=1.0, peak_bytes=None, stored_bytes=1)
    return judge(
        [f"m{i}" for i in range(n)], made, wanted, np.arange(len(wanted)) if clusters is None else clusters,
        seeds=range(made.shape[1]), metric="accuracy", margin=margin, costs=[costs] * n, baselines={}, failed={},
        folds=folds,
    )  # fmt: skip


def told(found: Comparison, name: str) -> Standing:
    """What is said of one method."""
    return next(one for one in found.standings if one.name == name)


# --- one race of each kind; True where what should come out does ------------------------------------------------------


def two_names(draw: np.random.Generator) -> bool:
    """A run repeats itself to the bit, so a method under a second name answers the same."""
    wanted, made = answers(draw, [0.85], rows=1000, seeds=3)
    return judged(wanted, made[[0, 0]]).standings[1].word == "ties"


def repeated_nearly(draw: np.random.Generator) -> bool:
    """On a machine that does not repeat to the bit, a hundredth of the second name's answers comes out otherwise."""
    wanted, made = answers(draw, [0.85, 0.85], rows=1000, seeds=3)
    first, other = made
    again = np.where(draw.random(first.shape) < 0.16, other, first)  # 6 % of these differ
    return judged(wanted, np.stack([first, again])).standings[1].word == "ties"


def equal(methods: int, seeds: int) -> Race:
    """Methods that are equally good, each with draws of its own: none may be called worse."""

    def race(draw: np.random.Generator) -> bool:
        found = judged(*answers(draw, [0.85] * methods, rows=1000, seeds=seeds))
        return all(one.word != "worse" for one in found.standings)

    return race


def equal_ties(rows: int, seeds: int) -> Race:
    """Equally good, with other draws, and a margin of three points: the tie is shown."""

    def race(draw: np.random.Generator) -> bool:
        found = judged(*answers(draw, [0.85, 0.85], rows=rows, seeds=seeds), margin=0.03)
        return found.standings[1].word == "ties"

    return race


def gain(seeds: int, noise: float = 0.05) -> Race:
    """Three points at 1,000 rows: found, and on the right side."""

    def race(draw: np.random.Generator) -> bool:
        return told(judged(*answers(draw, [0.88, 0.85], rows=1000, seeds=seeds, noise=noise)), "m1").word == "worse"

    return race


def last_of_four(draw: np.random.Generator) -> bool:
    """Three equal methods and one ten points behind, over six seeds: it is found."""
    return told(judged(*answers(draw, [0.85, 0.85, 0.85, 0.75], rows=1000, seeds=6)), "m3").word == "worse"


def copies(draw: np.random.Generator) -> bool:
    """A test half where each text stands three times, in other letters: the interval is wider than of as many texts."""
    wanted, made = answers(draw, [0.88, 0.85], rows=300, seeds=6)
    texts = [f"{form} {chr(97 + row // 26)}{chr(97 + row % 26)}" for form in ("Of", "of", "OF,") for row in range(300)]
    together = clusters(texts)
    wanted, made = np.tile(wanted, 3), np.tile(made, 3)
    pairs = [judged(wanted, made, copied).standings for copied in (together, np.arange(900))]
    wide, narrow = (other.difference for _, other in pairs)
    assert wide is not None and narrow is not None
    score = [best.high - best.low for best, _ in pairs]
    return wide.high - wide.low > narrow.high - narrow.low and score[0] > 1.2 * score[1]


def one_seed(draw: np.random.Generator) -> bool:
    """A clear gain on one seed: it is said that it cannot be told."""
    found = judged(*answers(draw, [0.9, 0.8], rows=1000, seeds=1))
    said = any("cannot be told from one seed" in line for line in found.findings)
    return said and found.standings[1].word == "not told apart"


def inside(seeds: int) -> Race:
    """The interval of a difference holds the true one."""

    def race(draw: np.random.Generator) -> bool:
        found = judged(*answers(draw, [0.88, 0.85], rows=1000, seeds=seeds, between=0.01))
        gap = told(found, "m1" if found.standings[0].name == "m0" else "m0").difference
        assert gap is not None
        return gap.low <= (-0.03 if found.standings[0].name == "m0" else 0.03) <= gap.high

    return race


def crossed(chances: tuple[float, ...], seeds: int, luck: float = 0.0) -> Callable[[np.random.Generator], Comparison]:
    """A thousand rows in five folds, each answered by runs with draws of their own.

    Args:
        luck: how far the rows that a fold learns favour a method, for all seeds alike, as a standard deviation.
    """

    def race(draw: np.random.Generator) -> Comparison:
        parts = []
        for _ in range(5):
            favoured = [chance + luck * draw.standard_normal() for chance in chances]
            parts.append(answers(draw, favoured, rows=200, seeds=seeds, between=0.01))
        wanted = np.concatenate([rows for rows, _ in parts])
        made = np.concatenate([said for _, said in parts], axis=2)
        return judged(wanted, made, folds=np.repeat(np.arange(5), 200))

    return race


def crossed_equal(seeds: int, luck: float = 0.0) -> Race:
    """Two equally good methods in five folds: neither may be called worse."""
    return lambda draw: all(s.word != "worse" for s in crossed((0.85, 0.85), seeds, luck)(draw).standings)


def crossed_gain(seeds: int) -> Race:
    """Three points in five folds: found, and on the right side."""
    return lambda draw: told(crossed((0.88, 0.85), seeds)(draw), "m1").word == "worse"


@dataclass(frozen=True)
class Kind:
    """A kind of race, and the share of a hundred that must come out so; None where there is no bar."""

    says: str
    race: Race
    bar: int | None


KINDS = (
    Kind("a method under two names, the same answers, 3 seeds: ties", two_names, 95),
    Kind("the same, 1 % of the second name's answers otherwise: ties", repeated_nearly, None),
    Kind("2 equal methods, own draws, 3 seeds: neither is called worse", equal(2, 3), 95),
    Kind("2 equal methods, own draws, 6 seeds: neither is called worse", equal(2, 6), 95),
    Kind("10 equal methods, own draws, 3 seeds: none is called worse", equal(10, 3), 95),
    Kind("10 equal methods, own draws, 6 seeds: none is called worse", equal(10, 6), 95),
    Kind("a gain of 3 points, 1,000 rows, 6 seeds: found", gain(6), 80),
    Kind("the same where 12 % of the answers differ between seeds: found", gain(6, 0.2), 80),
    Kind("a gain of 3 points, 1,000 rows, 3 seeds: found on these seeds", gain(3), None),
    Kind("3 equal methods and one 10 points behind, 6 seeds: it is found", last_of_four, 95),
    Kind("each text three times in the test half: a wider interval", copies, 95),
    Kind("a gain of 10 points on 1 seed: it is said that it cannot be told", one_seed, 100),
    Kind("95 % interval of the difference, 3 seeds: holds the true one", inside(3), 92),
    Kind("95 % interval of the difference, 6 seeds: holds the true one", inside(6), 92),
    Kind("2 equal methods, own draws, margin 0.03, 1,000 rows, 6 seeds: the tie is shown", equal_ties(1000, 6), None),
    Kind("the same with 3 seeds", equal_ties(1000, 3), None),
    Kind("2 equal methods in 5 folds, own draws, 3 seeds: neither is called worse", crossed_equal(3), 95),
    Kind("2 equal methods in 5 folds, own draws, 6 seeds: neither is called worse", crossed_equal(6), 95),
    Kind(
        "the same where each fold's rows favour a method by 1 point (standard deviation)", crossed_equal(6, 0.01), None
    ),
    Kind("a gain of 3 points in 5 folds, 1,000 rows, 3 seeds: found on these seeds", crossed_gain(3), 80),
    Kind("a gain of 3 points in 5 folds, 1,000 rows, 6 seeds: found", crossed_gain(6), 80),
)


def counted(kind: Kind, races: int) -> int:
    """How many of the races come out as they should."""
    return sum(kind.race(np.random.default_rng(number)) for number in range(races))


def main() -> int:
    """The command line; 1 where a bar is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planted_truth", description=__doc__)
    parser.add_argument("--races", type=int, default=100, help="of each kind")
    parser.add_argument("--page", action="store_true", help="write the table of docs/howto/compare.md")
    words = parser.parse_args()
    missed, lines = 0, ["| race | as it should, of 100 | bar |", "| --- | --- | --- |"]
    for kind in KINDS:
        share = 100 * counted(kind, words.races) / words.races
        below = kind.bar is not None and share < kind.bar
        missed += below
        bar = "-" if kind.bar is None else str(kind.bar)
        print(f"{share:5.1f}  bar {bar:>3}  {'MISSED  ' if below else ''}{kind.says}", flush=True)
        lines.append(f"| {kind.says} | {share:g} | {bar} |")
    if words.page:
        text = PAGE.read_text(encoding="utf-8")
        head, tail = text.split(BEGIN)[0], text.split(END)[1]
        made = "\n".join(["", f"{words.races} races of each kind.", "", *lines, "", ""])
        PAGE.write_text(head + BEGIN + made + END + tail, encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

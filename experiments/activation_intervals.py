"""Would intervals of memory be better if they grew with the share of activations? Trains nothing.

    python -m experiments.activation_intervals

Counts the activations of the committed runs of benchmarks/plan_grid.py again, and makes each run's interval from the
runs of other methods. The error of a run is divided by

    s = k (forecast + constant - activations) + activations

before quantiles are taken: k = 1 is what `luthier plan` does but for the logarithm, and a small k says that most of an
error is in the activations. Width is (high - low) / likely, the median; thirds are by the share of activations.
"""

import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.plan_grid import specs
from luthier.forecast import Pair, committed, constant_of
from luthier.forecast.interval import ENOUGH, ends_of
from luthier.surgery import compose
from luthier.training.precision import Precision
from luthier.workflow.outline import outline_of
from luthier.workflow.plan import activations_of, task_of_rows, weights_in

Judged = tuple[Pair, float, float, float]


def activations(pairs: Sequence[Pair], home: Path) -> dict[Pair, int]:
    """Bytes of each run's activations, counted anew; rows are written to `home`."""
    one_of = {(spec.model, spec.method): spec for spec in specs(home, 4)}
    first = {spec.model: spec for spec in one_of.values()}
    outlines = {model: outline_of(model) for model in first}
    tasks = {model: task_of_rows(spec, outlines[model]) for model, spec in first.items()}
    precision, found = Precision("bf16", "as in the grid"), {}
    for pair in pairs:
        spec, outline, task = one_of[pair.model, pair.method], outlines[pair.model], tasks[pair.model]
        method = compose.method(pair.method, {})
        dtype = weights_in(method, outline, spec, task, precision)
        grown = activations_of(method, outline, spec, task, precision, dtype, pair.rows, pair.tokens)
        if not isinstance(grown, str):
            found[pair] = grown.at(pair.rows)
    return found


def judged(grown: dict[Pair, int], k: float) -> list[Judged]:
    """Every run with the low, likely and high end of its interval."""
    found: list[Judged] = []
    for pair in grown:
        others = [p for p in grown if p.method != pair.method]
        own = [p for p in others if p.family == pair.family]
        constant = constant_of(others)

        def size(p: Pair, constant: int = constant) -> float:
            return k * (p.forecast + constant - grown[p]) + grown[p]

        scores = sorted((p.measured - p.forecast - constant) / size(p) for p in (own if len(own) >= ENOUGH else others))
        low, high = ends_of(scores)
        low, middle, high = (pair.forecast + constant + v * size(pair) for v in (low, scores[len(scores) // 2], high))
        found.append((pair, low, middle, high))
    return found


def told(found: Sequence[Judged]) -> str:
    inside = sum(low <= pair.measured <= high for pair, low, _, high in found)
    above = sum(pair.measured > high for pair, _, _, high in found)
    width = statistics.median((high - low) / middle for _, low, middle, high in found)
    return f"{inside} of {len(found)}, {above} above, {width:.2f}"


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as home:
        grown = activations(committed(), Path(home))
    print("| k | median error | all: inside, above, width | least third | middle | largest third |")
    print("|---|---|---|---|---|---|")
    for k in (1, 0.5, 0.3, 0.2, 0.15, 0.1, 0.05):
        found = sorted(judged(grown, k), key=lambda one: grown[one[0]] / one[0].forecast)
        third = len(found) // 3
        parts = (found, found[:third], found[third : 2 * third], found[2 * third :])
        error = statistics.median(abs(pair.measured / middle - 1) for pair, _, middle, _ in found)
        print(f"| {k} | {error:.1%} | {' | '.join(told(part) for part in parts)} |", flush=True)


if __name__ == "__main__":
    main()

"""The learning rate of each method of a comparison: as many runs for each, on rows of the training half alone.

The training half is written down as rows of its own, of which each of these runs holds a part out, the same for all.
So no run that a rate is chosen by has seen the test half, and the test half is scored by the final runs only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from luthier.comparison.answers import answers_of
from luthier.comparison.cells import Cell, Entrant, Failure, cells_of
from luthier.comparison.rates import MOST_RATES, Rates
from luthier.comparison.scores import score_named
from luthier.core import ConfigError
from luthier.data.load_data import Data
from luthier.runs import Record, durable
from luthier.runs.spec import DataSpec, OptimSpec, RunSpec
from luthier.workflow.choices import scaled_rates

__all__ = ["SEARCHED", "Trial", "choose_rates", "factors", "rates_of", "rows_of", "trial_at", "trials_of"]

SEARCHED = "rates"
"""Folder of the runs of the search."""
SELECT_SHARE = 0.25
"""Of the training rows: what a rate is chosen by."""


@dataclass(frozen=True)
class Trial:
    """One run of the search."""

    cell: Cell
    factor: float


def factors(n: int) -> tuple[float, ...]:
    """So many factors of about three apart, 1 among them, in rising order.

    >>> [round(f, 2) for f in factors(5)]
    [0.1, 0.32, 1.0, 3.16, 10.0]

    Raises:
        ConfigError: fewer than 2 or more than MOST_RATES.
    """
    if not 2 <= n <= MOST_RATES:
        raise ConfigError(f"--tune-lr {n}: between 2 and {MOST_RATES} rates for each method, such as 5.")
    return tuple(math.sqrt(10) ** (i - (n - 1) // 2) for i in range(n))


def rates_of(base: RunSpec, entrant: Entrant, factor: float) -> OptimSpec:
    """The base's rates times `factor`; where it has none, the method's own."""
    return scaled_rates(replace(base, method=entrant.method, settings={**base.settings, **entrant.settings}), factor)


def trials_of(base: RunSpec, entrants: Sequence[Entrant], n: int, home: Path, data: Data) -> dict[str, list[Trial]]:
    """The runs of the search, for each method; the rows that they share are written into `home`."""
    rows = rows_of(base, home, data)
    return {e.name: [trial_at(base, e, factor, home, rows) for factor in factors(n)] for e in entrants}


def rows_of(base: RunSpec, home: Path, data: Data) -> DataSpec:
    """The training half, written into `home`, of which the runs of a search hold a part out."""
    return DataSpec(**{
        **vars(base.data), "source": str(_write_rows(home, data)), "test": None, "fold": None, "delimiter": None,
        "encoding": None, "test_share": SELECT_SHARE,
    })  # fmt: skip


def trial_at(base: RunSpec, entrant: Entrant, factor: float, home: Path, rows: DataSpec) -> Trial:
    """One run of a search, at the method's own rates times `factor`."""
    spec = replace(base, data=rows, optim=rates_of(base, entrant, factor))
    return Trial(cells_of(spec, [entrant], [0], home, under=SEARCHED)[0], factor)


def _write_rows(home: Path, data: Data) -> Path:
    """The training half, under a name that says which rows they are."""
    path = home / f"train-{data.train.fingerprint()[:12]}.jsonl"
    if not path.is_file():
        lines = [json.dumps(row, ensure_ascii=False) for row in data.train.rows]
        durable.write_bytes(path, ("\n".join(lines) + "\n").encode())
    return path


def choose_rates(
    base: RunSpec, trials: Mapping[str, Sequence[Trial]], failures: Mapping[Path, Failure], metric: str
) -> tuple[dict[str, Rates], dict[str, str]]:
    """The best rate of each method, and why some have none.

    The best score wins; among equals the lower loss, and then the rate nearest to the method's own.
    """
    found, failed = {}, {}
    for name, own in trials.items():
        scored = {i: _scored(t.cell, metric) for i, t in enumerate(own) if t.cell.path not in failures}
        if not scored:
            why = failures[own[(len(own) - 1) // 2].cell.path].message
            failed[name] = f"none of its {len(own)} rates gave a result. {why}"
            continue
        best = max(scored, key=lambda i: (scored[i][0], -scored[i][1], -abs(math.log(own[i].factor))))
        lrs = [t.cell.spec.optim.lr for t in own]
        found[name] = Rates(
            rates=tuple(float(lr) for lr in lrs if lr is not None), factors=tuple(t.factor for t in own),
            scores=tuple(scored[i][0] if i in scored else None for i in range(len(own))), chosen=best,
            rows=scored[best][2], seconds=sum(s[3] for s in scored.values()), given=(base.optim.lr, base.optim.head_lr),
        )  # fmt: skip
    return found, failed


def _scored(cell: Cell, metric: str) -> tuple[float, float, int, float]:
    """Score, loss, rows and seconds."""
    answers, record = answers_of(cell.path), Record.from_json((cell.path / "record.json").read_bytes())
    numbers = {label: i for i, label in enumerate(dict.fromkeys([*answers.wanted, *answers.said]))}
    wanted, said = (np.array([numbers[label] for label in one]) for one in (answers.wanted, answers.said))
    score = score_named(metric)(wanted, said, np.ones(len(wanted)))
    return score, record.scores.get("loss", math.inf), len(wanted), record.seconds

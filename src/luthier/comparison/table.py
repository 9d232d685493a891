"""The table of a comparison, as a file: what follows from the specs alone, and nothing that was measured with a clock.

The same specs give the same bytes, whoever computed the runs, in whatever order, and however often a process was killed
meanwhile, as long as threads and libraries are the same.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from luthier.comparison.cells import Cell
from luthier.comparison.verdict import Comparison
from luthier.runs.ledger import Ledger

__all__ = ["table_csv"]

HEAD = ("method", "seed", "score", "mean", "verdict", "behind", "p", "trained", "stored", "sha256", "failed")


def table_csv(found: Comparison, cells: Sequence[Cell], ledger: Ledger) -> bytes:
    """One line for each run, best method first; `score` and `mean` are of the comparison's metric.

    With folds a run's score is of the rows of its fold, and the mean is of all rows and seeds.
    """
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator="\n")
    of_folds = ("fold",) if found.folds else ()
    writer.writerow((HEAD[0], *of_folds, *HEAD[1:]))
    for one in found.standings:
        gap = f"{one.difference.value:.6f}" if one.difference is not None else ""
        for number, cell in enumerate(c for c in cells if c.entrant.name == one.name):
            told = ledger.result(cell.id) or {}
            score = told.get("scores", {}).get(found.metric) if found.folds else one.scores[number]
            writer.writerow((
                one.name, *[cell.fold] * len(of_folds), cell.seed, "" if score is None else f"{score:.6f}",
                f"{one.score:.6f}", one.word, gap, f"{one.p:.6g}", one.costs.trained,
                told.get("stored", one.costs.stored_bytes), told.get("sha256", ""), "",
            ))  # fmt: skip
    for name in sorted(found.failed):
        writer.writerow((name, *[""] * (9 + len(of_folds)), " ".join(found.failed[name].split())))
    return out.getvalue().encode()

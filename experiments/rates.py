"""Settings of a method tried without the table's test rows: they are chosen here, and scored there.

    python -m experiments.rates METHOD [FIELD=VALUE ...] [--seed N]

Trains on the 600 rows of trec6 that `experiments.methods` trains on, and scores 300 other questions of trec6's training
half. Prints one line: the accuracy, and facts of the run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path

from experiments.defaults.baselines import MODEL
from experiments.defaults.panel import PANEL, halves, rest
from experiments.methods.__main__ import sources_of
from experiments.one_run import one_run
from experiments.results import named, scored
from luthier.surgery import METHODS
from luthier.surgery.compose import spelling

ROWS = 300


def main() -> None:
    words = argparse.ArgumentParser(prog="python -m experiments.rates", description=__doc__)
    words.add_argument("method", type=partial(named, METHODS.get))
    words.add_argument("given", nargs="*", metavar="FIELD=VALUE", help="a field of the run, such as optim.lr=1e-3")
    words.add_argument("--seed", type=int, default=0)
    asked = words.parse_args()
    train, _ = halves(PANEL[0])
    with tempfile.TemporaryDirectory() as home:
        held = rest(PANEL[0], ROWS, Path(home) / "held.jsonl")
        right, facts = one_run(
            MODEL, spelling(asked.method), asked.seed, train, held, f"{home}/run", asked.given, sources_of(asked.method)
        )
    which = {"method": asked.method, "given": asked.given, "seed": asked.seed}
    print(json.dumps(which | scored(right) | {name: facts[name] for name in ("steps", "cpu_seconds")}))


if __name__ == "__main__":
    main()

"""`compare`: every method on the same rows, in the same order, with the same seeds; then what may be said of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.comparison.answers import Answers, answers_of, clusters
from luthier.comparison.cells import Cell, Entrant, Failure, Said, Sweep, cells_of, finished
from luthier.comparison.engines import check_engine, engine_named
from luthier.comparison.front_search import Front, check_front, search_front, with_test
from luthier.comparison.race import Budget, race
from luthier.comparison.rates import Rates, said_of
from luthier.comparison.scores import score_named
from luthier.comparison.search import Asked, check_search, search_rates
from luthier.comparison.statistics import LEAST_SEEDS, smallest_visible
from luthier.comparison.table import table_csv
from luthier.comparison.tuning import SEARCHED, factors, rates_of
from luthier.comparison.verdict import Comparison, Costs, judge
from luthier.core import ConfigError, DataError, IntegrityError, Locked, LuthierError, plain, several
from luthier.data.columns import Columns
from luthier.data.load_data import Data, load_data
from luthier.data.problems import text_of
from luthier.data.rows import Table
from luthier.runs import Record, durable
from luthier.runs.ledger import LEASE, Ledger
from luthier.runs.lock import Lock
from luthier.runs.spec import RunSpec
from luthier.training.word_counts import answers_by_words
from luthier.workflow.load_model import find_model, load_config

__all__ = ["compare"]

RACED_RATES = 3
"""Rates of each method in a race where nobody says how many."""


def compare(
    base: RunSpec,
    entrants: Sequence[Entrant],
    *,
    seeds: int,
    home: Path,
    metric: str = "accuracy",
    margin: float | None = None,
    workers: int = 1,
    threads: int | None = None,
    tune_lr: int | None = None,
    search: str = "grid",
    budget: Budget | None = None,
    front: Front | None = None,
    engine: str = "local",
    lease: float = LEASE,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Run what is not finished, and judge the whole.

    Args:
        base: what all have in common; method, settings of methods, seed and folder are set for each.
        home: folder of the comparison; the same call goes on where it was stopped.
        metric: accuracy, macro_f1 or mcc.
        margin: differences below it do not matter.
        workers: runs at a time.
        tune_lr: learning rates that are tried for each method first, on rows of the training half.
        search: how these are chosen: grid, halving or optuna.
        budget: race first: the methods at `tune_lr` rates each (3 where none is given), of which the worse half leaves
            at each rung and whoever exceeds the budget; only the winner makes the final runs.
        front: search for configurations of autopeft first, those that are best at their size make the final runs.
        engine: who computes the runs: local, processes of this machine; ray.
        lease: seconds without a sign of life after which a run may be taken over by another process.

    Raises:
        ConfigError: nothing to compare, or a task whose rows have no one label.
        DataError: rows that cannot be used.
        IntegrityError: the ledger there is of a newer version, or damaged.
        Interrupted: by a signal; the same call goes on.
    """
    score_named(metric)
    check_engine(engine)
    check_search(search)
    _check(entrants, seeds)
    if tune_lr is not None:
        factors(tune_lr)
    if front is not None:
        check_front(front.n, entrants, tune_lr, budget is not None)
    _check_home(home)
    data = load_data(base.data, base.task, load_config(find_model(base.model)))
    if data.task.name != "classification" or data.task.multi_label:
        raise ConfigError(
            f"compare: the task is {data.task.name}, and only rows with one label each are compared so far. Train the "
            "methods one by one; `luthier evaluate` scores each on the same file."
        )
    if data.test is None:
        raise ConfigError("compare: no rows are held out (data.test_share is 0). Methods are compared on such rows.")
    for note in data.notes:
        say(note)
    say(_visible(data.test, data.columns, len(entrants), seeds))
    _make_home(home)
    sweep = Sweep(
        Ledger(home, make=True, lease=lease), lambda n: engine_named(engine, sweep.ledger, n), workers, threads, say
    )
    with _present(home, say), closing(sweep):
        asked = Asked(base, tuple(entrants), tune_lr or 0, data, metric)
        rates: dict[str, Rates] = {}
        without: dict[str, str] = {}
        said: tuple[str, ...] = ()
        if budget is not None:
            won = race(replace(asked, n=tune_lr or RACED_RATES), budget, sweep, say, _announcing)
            racing, said = [won.entrant], won.findings
            optims = {won.entrant.name: rates_of(base, won.entrant, won.factor)}
        elif front is not None:
            fronted = search_front(replace(asked, n=front.n), front.space_of, sweep, say, _announcing)
            racing, said, optims = list(fronted.entrants), fronted.findings, {}
        else:
            rates, without = search_rates(search, asked, sweep, say, _announcing) if tune_lr else ({}, {})
            optims = {e.name: rates_of(base, e, rates[e.name].factor) for e in entrants if e.name in rates}
            racing = [e for e in entrants if e.name not in without]
        cells = cells_of(base, racing, range(seeds), home, rates=optims)
        there = sum(finished(cell) for cell in cells)
        if there:
            say(f"{there} of {len(cells)} runs are finished already")
        failures = sweep.settle(cells, _announcing(say, len(cells), there))
        if late := sweep.ledger.discarded():
            say(f"{several(late, 'answer')} came after others had taken the cell over; the first counts")
        cells = sweep.placed(cells)
        runs = {e.name: tuple(str(c.path.relative_to(home)) for c in cells if c.entrant == e) for e in racing}
        found = _judge(cells, failures, without, data, metric, margin)
        found = replace(found, runs=runs, rates=rates, findings=(*said, *found.findings, *said_of(rates)))
        if front is not None:
            with_test(home, {s.name: s.score for s in found.standings})
        durable.write_json(home / "comparison.json", plain(found))
        durable.write_bytes(home / "table.csv", table_csv(found, cells, sweep.ledger))
    return found


@contextmanager
def _present(home: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Show that somebody works here; whoever comes second shares the cells."""
    lock = Lock(home / "run.lock")
    try:
        lock.acquire()
    except Locked:
        say(f"another process works at {home} too: the runs are shared, and none is made twice")
    try:
        yield
    finally:
        lock.release()


def _check(entrants: Sequence[Entrant], seeds: int) -> None:
    names = [e.name for e in entrants]
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(f"--method {twice} stands twice. Name each once; settings tell two apart: {twice}:rank=4.")
    if not names:
        raise ConfigError("compare: no methods are named. Name them: --method lora,ia3,bitfit, or --method all.")
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: give at least 1; 3 show the spread, 6 allow a claim over seeds.")


def _visible(test: Table, columns: Columns, methods: int, seeds: int) -> str:
    """How small a difference the rows can show; said before anything runs."""
    alone = int(clusters([text_of(row, columns) for row in test.rows]).max()) + 1
    if alone == 1:  # drawn together, they are one row, and a row has no spread
        raise DataError(
            f"compare: the {several(len(test), 'held-out row')} of {test.source} are near copies of one another, and "
            "one row tells no methods apart. Hold out other rows: --test FILE, or a larger --test-share."
        )
    copies = f", {len(test) - alone} of them near copies of others" if alone < len(test) else ""
    said = (
        f"{several(methods, 'method')}, {several(seeds, 'seed')}, {len(test)} held-out rows{copies}: a difference in "
        f"accuracy under {smallest_visible(alone):.3f} will most likely not be seen (where two methods differ on a "
        "tenth of them)"
    )
    if seeds == 1:
        return f"{said}. One seed tells nothing of methods: no spread between seeds is known. Better --seeds 3, or 6."
    return said if seeds >= LEAST_SEEDS else f"{said}; a claim over seeds takes --seeds {LEAST_SEEDS}"


def _check_home(home: Path) -> None:
    if home.exists() and not home.is_dir():
        raise ConfigError(f"--out {home}: is a file. Name a folder for the comparison.")
    if (home / "run.json").exists():
        raise ConfigError(f"--out {home}: is the folder of a run. Name another for the comparison.")


def _make_home(home: Path) -> None:
    for folder in reversed([p for p in (home / "cells", *(home / "cells").parents) if not p.exists()]):
        durable.make_folder(folder)


def _announcing(say: Callable[[str], None], total: int, there: int) -> Said:
    done = there

    def announce(cell: Cell, failure: Failure | None, told: Mapping[str, Any]) -> None:
        nonlocal done
        done += 1
        if failure is not None:
            say(f"[{done}/{total}] {_called(cell)}: {failure.message}")
            return
        shown = " · ".join(f"{name} {value:.3f}" for name, value in told["scores"].items() if name != "loss")
        early = f" after {cell.until:.0%} of the steps" if cell.until < 1 else ""
        say(f"[{done}/{total}] {_called(cell)}{early}: {shown} · {told['seconds']:.1f} s")

    return announce


def _called(cell: Cell) -> str:
    if cell.path.parent.name == SEARCHED:
        return f"{cell.entrant.name}, learning rate {cell.spec.optim.lr:.2g}"
    return f"{cell.entrant.name}, seed {cell.seed}"


# --- what came out ----------------------------------------------------------------------------------------------------


def _judge(
    cells: Sequence[Cell], failures: dict[Path, Failure], without: dict[str, str], data: Data, metric: str,
    margin: float | None,
) -> Comparison:  # fmt: skip
    by_entrant: dict[str, list[Cell]] = {}
    for cell in cells:
        by_entrant.setdefault(cell.entrant.name, []).append(cell)
    failed = dict(without)
    whole: dict[str, list[Cell]] = {}
    for name, own in by_entrant.items():
        wrong = next((failures[c.path] for c in own if c.path in failures), None)
        if wrong is not None:
            failed[name] = wrong.message
        else:
            whole[name] = own
    if not whole:
        told = "; ".join(f"{name}: {why}" for name, why in failed.items())
        error = LuthierError(f"compare: no method has a result. {told}")
        error.exit_code = max((f.exit_code for f in failures.values()), default=1)  # type: ignore[misc]
        raise error
    answers = {name: [answers_of(cell.path) for cell in own] for name, own in whole.items()}
    first = next(iter(answers.values()))[0]
    for name, own_answers in answers.items():
        for cell, one in zip(whole[name], own_answers, strict=True):
            if one.places != first.places or one.wanted != first.wanted:
                raise IntegrityError(
                    f"{cell.path}: its held-out rows are others than those of the other runs. The data has changed "
                    "since: compare into another folder."
                )
    numbers = {label: i for i, label in enumerate(data.task.labels)}
    wanted = _numbered(first.wanted, numbers)
    answered = np.array([[_numbered(one.said, numbers) for one in own] for own in answers.values()])
    return judge(
        list(whole), answered, wanted, clusters(first.texts),
        seeds=[cell.seed for cell in next(iter(whole.values()))], metric=metric, margin=margin,
        costs=[_costs(own) for own in whole.values()],
        calibration=[_calibration(own) for own in whole.values()],
        baselines=_baselines(data, first, numbers), failed=failed,
    )  # fmt: skip


def _numbered(labels: Sequence[str], numbers: dict[str, int]) -> NDArray[np.int64]:
    return np.array([numbers[label] for label in labels], dtype=np.int64)


def _record(cell: Cell) -> Record:
    return Record.from_json((cell.path / "record.json").read_bytes())


def _costs(cells: Sequence[Cell]) -> Costs:
    records = [_record(cell) for cell in cells]
    peaks = [r.peak_bytes for r in records if r.peak_bytes is not None]
    return Costs(
        trained=records[0].trained,
        seconds=float(np.mean([r.seconds for r in records])),
        peak_bytes=max(peaks) if peaks else None,
        stored_bytes=records[0].stored,
    )


def _calibration(cells: Sequence[Cell]) -> dict[str, float]:
    """Means over seeds of what every one of the runs wrote down."""
    paths = [cell.path / "quality.json" for cell in cells]
    each = [json.loads(path.read_bytes()) if path.is_file() else {} for path in paths]
    sure = ("calibration_error", "brier", "nll")
    names = (*sure, "temperature", *(f"calibrated_{name}" for name in sure))
    return {n: float(np.mean([e[n] for e in each])) for n in names if all(e.get(n) is not None for e in each)}


def _baselines(data: Data, asked: Answers, numbers: dict[str, int]) -> dict[str, NDArray[np.int64]]:
    """Answers of what needs no model, for the rows that all methods answered; learnt from all rows but these."""
    usable = [row for row in data.train.rows if data.columns.outcome(row) in numbers]
    targets = _numbered([data.columns.outcome(row) for row in usable], numbers)
    most = int(np.bincount(targets, minlength=len(numbers)).argmax())
    found = {f"always answering {data.task.labels[most]!r}": np.full(len(asked.places), most, dtype=np.int64)}
    said = answers_by_words([text_of(row, data.columns) for row in usable], targets, asked.texts)
    if said is not None:
        found["word counts (TF-IDF) with logistic regression"] = said
    return found

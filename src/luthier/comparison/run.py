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

from luthier.comparison.answers import answers_of
from luthier.comparison.baselines import baselines
from luthier.comparison.cells import Cell, Entrant, Failure, Said, Sweep, cells_of
from luthier.comparison.engines import check_engine, engine_named
from luthier.comparison.front_search import Front, check_front, search_front, with_test
from luthier.comparison.parts import Part, check_cv, parts_of, rows_in_no_fold
from luthier.comparison.race import Budget, race
from luthier.comparison.rates import Rates, said_of_parts
from luthier.comparison.scores import score_named
from luthier.comparison.search import Asked, check_search, search_rates
from luthier.comparison.sizes import Sized, sized
from luthier.comparison.statistics import LEAST_SEEDS, smallest_visible
from luthier.comparison.table import table_csv
from luthier.comparison.tuning import SEARCHED, factors, rates_of
from luthier.comparison.verdict import Comparison, Costs, RaceTold, judge
from luthier.core import ConfigError, DataError, IntegrityError, Locked, LuthierError, plain, several
from luthier.data.near_copies import clusters
from luthier.data.problems import text_of
from luthier.runs import Record, durable
from luthier.runs.ledger import LEASE, Ledger
from luthier.runs.lock import Lock
from luthier.runs.spec import RunSpec

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
    cv: int | None = None,
    params: int | None = None,
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
        cv: so many folds of the rows, each held out once, in place of a held-out half; near copies stay together.
        params: numbers that a method may train beside the head; each is made as large as that allows.
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
    if params is not None and front is not None:
        raise ConfigError(f"--budget params={params}: --front shows the best of each size. Leave one of the two out.")
    if cv is not None:
        check_cv(base, cv, ["--race"] * (budget is not None) + ["--front"] * (front is not None))
    _check_home(home)
    parts = parts_of(base, cv)
    for note in dict.fromkeys(note for part in parts for note in part.data.notes):
        say(note)
    if in_none := rows_in_no_fold(parts):
        say(in_none)
    told = None if budget is None else RaceTold(
        methods=tuple(e.name for e in entrants), rates=tune_lr, given=(base.optim.lr, base.optim.head_lr),
        minutes=budget.minutes, memory=budget.memory,
    )  # fmt: skip
    found_sizes = Sized(tuple(entrants), {}, ())
    if params is not None:
        found_sizes = sized(base, entrants, parts[0].data.task, params)
        for line in (*found_sizes.said, *(f"{name}: {why}" for name, why in found_sizes.refused.items())):
            say(line)
        entrants = found_sizes.entrants
    say(_visible(parts, len(entrants), seeds))
    _make_home(home)
    sweep = Sweep(
        Ledger(home, make=True, lease=lease), lambda n: engine_named(engine, sweep.ledger, n), workers, threads, say
    )
    with _present(home, say), closing(sweep):
        asked = Asked(base, tuple(entrants), tune_lr or 0, parts[0].data, metric)
        rates: list[dict[str, Rates]] = []  # of each part
        without: dict[str, str] = dict(found_sizes.refused)
        said: tuple[str, ...] = ()
        if budget is not None:
            won = race(replace(asked, n=tune_lr or RACED_RATES), budget, sweep, say, _announcing)
            racing, said = [won.entrant], won.findings
            optims = [{won.entrant.name: rates_of(base, won.entrant, won.factor)}]
        elif front is not None:
            fronted = search_front(replace(asked, n=front.n), front.space_of, sweep, say, _announcing)
            racing, said, optims = list(fronted.entrants), fronted.findings, [{}]
        else:
            for part in parts if tune_lr else ():
                within = replace(asked, base=part.base, data=part.data)
                each, none = search_rates(search, within, sweep, _in_fold(say, part), _announcing)
                rates.append(each)
                without |= none
            optims = [
                {e.name: rates_of(p.base, e, each[e.name].factor) for e in entrants if e.name in each}
                for p, each in zip(parts, rates or [{} for _ in parts], strict=True)
            ]
            racing = [e for e in entrants if e.name not in without]
        cells = [
            cell
            for number in range(seeds)
            for part, optim in zip(parts, optims, strict=True)
            for cell in cells_of(part.base, racing, [part.seed(number)], home, rates=optim, fold=part.fold)
        ]
        there = sweep.standing(cells)
        if there:
            say(f"{there} of {len(cells)} runs are finished already")
        failures = sweep.settle(cells, _announcing(say, len(cells), there))
        if late := sweep.ledger.discarded():
            say(f"{several(late, 'answer')} came after others had taken the cell over; the first counts")
        cells = sweep.placed(cells)
        runs = {e.name: tuple(str(c.path.relative_to(home)) for c in cells if c.entrant == e) for e in racing}
        found = _judge(cells, failures, without, parts, metric, margin)
        found = replace(
            found, runs=runs, params=params, race=told,
            findings=(*said, *found.findings, *found_sizes.said, *said_of_parts(rates)),
            rates=rates[0] if rates and cv is None else {}, fold_rates=tuple(rates) if cv is not None else (),
        )  # fmt: skip
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


def _in_fold(say: Callable[[str], None], part: Part) -> Callable[[str], None]:
    return say if not part.fold else lambda line: say(f"fold {part.fold}/{part.of}: {line}")


def _visible(parts: Sequence[Part], methods: int, seeds: int) -> str:
    """How small a difference the rows can show; said before anything runs."""
    texts = [text_of(row, part.columns) for part in parts for row in part.held.rows]
    test, alone, folds = parts[0].held, int(clusters(texts).max()) + 1, len(parts)
    if alone == 1:  # drawn together, they are one row, and a row has no spread
        raise DataError(
            f"compare: the {several(len(test), 'held-out row')} of {test.source} are near copies of one another, and "
            "one row tells no methods apart. Hold out other rows: --test FILE, or a larger --test-share."
        )
    copies = f", {len(texts) - alone} of them near copies of others" if alone < len(texts) else ""
    rows = f"{folds} folds, {len(texts)} rows" if folds > 1 else f"{len(texts)} held-out rows"
    said = (
        f"{several(methods, 'method')}, {several(seeds, 'seed')}, {rows}{copies}: a difference in "
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
    return f"{cell.entrant.name}, {f'fold {cell.fold}, ' if cell.fold else ''}seed {cell.seed}"


# --- what came out ----------------------------------------------------------------------------------------------------


def _judge(
    cells: Sequence[Cell], failures: dict[Path, Failure], without: dict[str, str], parts: Sequence[Part], metric: str,
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
    n = len(parts)
    answers = {name: [answers_of(cell.path) for cell in own] for name, own in whole.items()}  # seed by seed, all parts
    firsts = next(iter(answers.values()))[:n]
    for name, own_answers in answers.items():
        for number, one in enumerate(own_answers):
            if one.places != firsts[number % n].places or one.wanted != firsts[number % n].wanted:
                raise IntegrityError(
                    f"{whole[name][number].path}: its held-out rows are others than those of the other runs. The data "
                    "has changed since: compare into another folder."
                )
    numbers = {label: i for i, label in enumerate(parts[0].data.task.labels)}
    wanted = np.concatenate([_numbered(one.wanted, numbers) for one in firsts])
    answered = np.array([
        [np.concatenate([_numbered(one.said, numbers) for one in own[at : at + n]]) for at in range(0, len(own), n)]
        for own in answers.values()
    ])  # fmt: skip
    near = clusters([text for one in firsts for text in one.texts])
    runs = [[cell.path for cell in own] for own in whole.values()]
    return judge(
        list(whole), answered, wanted, near,
        seeds=range(answered.shape[1]), metric=metric, margin=margin,
        costs=[_costs(own) for own in whole.values()],
        calibration=[_calibration(own) for own in whole.values()],
        baselines=baselines(parts, firsts, [[own[at] for own in runs] for at in range(n)], numbers), failed=failed,
        folds=np.repeat(np.arange(n), [len(one.wanted) for one in firsts]) if n > 1 else None,
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

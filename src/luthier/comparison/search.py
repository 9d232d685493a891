"""Three ways to choose a rate for each method, with as many runs of as many steps for all.

grid       factors of about three apart
halving    the same, of which the worse half is left after a quarter and after a half of the steps. What goes on is the
           very run, resumed: at its end it has the bits of one that was never stopped
optuna     the method's own rate first, then where Optuna's sampler expects most of those before

Nothing but the ledger is kept. A search that was killed asks its seeded sampler the same questions again, and finds the
answers there.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.comparison.answers import answers_of
from luthier.comparison.cells import Entrant, Failure, Said, Sweep
from luthier.comparison.choices import one_of
from luthier.comparison.rates import Rates
from luthier.comparison.tuning import Trial, choose_rates, rows_of, trial_at, trials_of
from luthier.data.load_data import Data
from luthier.runs.spec import RunSpec

__all__ = ["RUNGS", "Asked", "check_search", "search_rates"]

RUNGS = (0.25, 0.5, 1.0)
LOWEST, HIGHEST = 0.1, 10.0
"""Factors of the method's own rate between which Optuna looks."""
Announcing = Callable[[Callable[[str], None], int, int], Said]
Found = tuple[dict[str, Rates], dict[str, str]]


@dataclass(frozen=True)
class Asked:
    """What a search is for: `n` runs of each entrant, on the training half of `data`."""

    base: RunSpec
    entrants: tuple[Entrant, ...]
    n: int
    data: Data
    metric: str


def check_search(name: str) -> None:
    """Refuse one that is not there, before work starts.

    Raises:
        ConfigError: none is called so.
        UsageError: its package is not installed.
    """
    one_of("--search", name, {"grid": "", "halving": "", "optuna": "search"})


def search_rates(name: str, asked: Asked, sweep: Sweep, say: Callable[[str], None], announcing: Announcing) -> Found:
    """The best rate of each method, and why some have none."""
    said = (
        f"learning rates: {asked.n} runs of each method first, one seed, on rows of the training half; the test half "
    )
    if name == "grid":
        trials = trials_of(asked.base, asked.entrants, asked.n, sweep.ledger.home, asked.data)
        cells = [trial.cell for own in trials.values() for trial in own]
        there = sweep.standing(cells)
        say(f"{said}are not read ({there} of {len(cells)} are finished)")
        failures = sweep.settle(cells, announcing(say, len(cells), there))
        return choose_rates(asked.base, trials, failures, asked.metric)
    say(f"{said}are not read; search: {name}")
    return (_by_halving if name == "halving" else _by_optuna)(asked, sweep, say, announcing)


def _by_halving(asked: Asked, sweep: Sweep, say: Callable[[str], None], announcing: Announcing) -> Found:
    trials = trials_of(asked.base, asked.entrants, asked.n, sweep.ledger.home, asked.data)
    alive = {name: list(range(len(own))) for name, own in trials.items()}
    best: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name in trials}
    until = {name: [0.0] * len(own) for name, own in trials.items()}
    spent = dict.fromkeys(trials, 0.0)
    whole, failures = {}, dict[Path, Failure]()
    for share in RUNGS:
        cells = {(n, i): replace(trials[n][i].cell, until=share) for n, own in alive.items() for i in own}
        failures |= sweep.settle(list(cells.values()), announcing(say, len(cells), 0))
        for (name, i), cell in cells.items():
            told = sweep.ledger.result(cell.id)
            if told is None:
                alive[name].remove(i)
                continue
            scores = told["scores"]
            far = abs(math.log(trials[name][i].factor))
            best[name][i] = (float(scores[asked.metric]), -float(scores.get("loss", math.inf)), -far)
            until[name][i] = share
            if share == RUNGS[-1] or i not in _better_half(alive[name], best[name]):
                spent[name] += float(told["seconds"])
        if share < RUNGS[-1]:
            for name, own in alive.items():
                kept = _better_half(own, best[name])
                left = [f"{trials[name][i].factor:.2g}" for i in own if i not in kept]
                alive[name] = kept
                if left:
                    say(f"{name}: after {share:.0%} of the steps, rates of {', '.join(left)} times its own are left")
    for name, tried in trials.items():
        if not alive[name]:
            continue
        chosen = max(alive[name], key=lambda i: best[name][i])
        whole[name] = Rates(
            rates=tuple(float(t.cell.spec.optim.lr or 0) for t in tried), factors=tuple(t.factor for t in tried),
            scores=tuple(best[name][i][0] if i in best[name] else None for i in range(len(tried))), chosen=chosen,
            rows=len(answers_of(tried[chosen].cell.path).wanted), seconds=spent[name],
            given=(asked.base.optim.lr, asked.base.optim.head_lr), search="halving", until=tuple(until[name]),
        )  # fmt: skip
    return whole, {name: _no_rate(tried, failures) for name, tried in trials.items() if name not in whole}


def _better_half(alive: list[int], scores: dict[int, tuple[float, float, float]]) -> list[int]:
    known = [i for i in alive if i in scores]
    kept = sorted(known, key=lambda i: scores[i], reverse=True)[: -(-len(known) // 2)]
    return sorted(kept)


def _no_rate(own: list[Trial], failures: dict[Path, Failure]) -> str:
    why = next((failures[t.cell.path].message for t in own if t.cell.path in failures), "")
    return f"none of its {len(own)} rates gave a result. {why}"


def _by_optuna(asked: Asked, sweep: Sweep, say: Callable[[str], None], announcing: Announcing) -> Found:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows = rows_of(asked.base, sweep.ledger.home, asked.data)
    studies: dict[str, Any] = {e.name: _study(optuna, e.name) for e in asked.entrants}
    trials: dict[str, list[Trial]] = {name: [] for name in studies}
    failures: dict[Path, Failure] = {}
    for _ in range(asked.n):
        questions = {e.name: studies[e.name].ask() for e in asked.entrants}
        for e in asked.entrants:
            factor = float(f"{questions[e.name].suggest_float('factor', LOWEST, HIGHEST, log=True):.3g}")
            trials[e.name].append(trial_at(asked.base, e, factor, sweep.ledger.home, rows))
        cells = [own[-1].cell for own in trials.values()]
        failures |= sweep.settle(cells, announcing(say, len(cells), sweep.standing(cells)))
        for name, question in questions.items():
            told = sweep.ledger.result(trials[name][-1].cell.id)
            if told is None:
                studies[name].tell(question, state=optuna.trial.TrialState.FAIL)
            else:
                studies[name].tell(question, float(told["scores"][asked.metric]))
    found, without = choose_rates(asked.base, trials, failures, asked.metric)
    return {name: replace(one, search="optuna") for name, one in found.items()}, without


def _study(optuna: Any, name: str) -> Any:
    """In memory, with a sampler that draws the same for the same method: its state follows from the answers alone."""
    seed = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=3))
    study.enqueue_trial({"factor": 1.0})
    return study

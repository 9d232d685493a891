"""A race: methods, sizes and rates against each other, of which the worse half leaves at each rung, within a budget.

Every candidate (a method with its settings, at a rate) is one run on rows of the training half. After an eighth of the
steps the worse half leaves, after a quarter again, and so on; what goes on is the very run, resumed. A budget of
minutes lets fewer go on, one of memory sends away who needs more. Each decision is written down before the next rung
begins, so that a race that was killed goes on with those that were made: times differ, what they decided must not.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from luthier.comparison.cells import Cell, Entrant, Failure, Said, Sweep
from luthier.comparison.search import Announcing, Asked
from luthier.comparison.tuning import SELECT_SHARE, Trial, trials_of
from luthier.core import ConfigError, LuthierError, human_bytes, human_seconds, plain, several
from luthier.runs import durable

__all__ = ["Budget", "Decision", "Raced", "budget_of", "race"]

RUNGS = (0.125, 0.25, 0.5, 1.0)
FILE = "race.json"


@dataclass(frozen=True)
class Budget:
    """What a comparison may take.

    Attributes:
        minutes: of all runs of a race together, on the wall.
        memory: of a run of a race, in bytes.
        steps: that every run makes, in a race or not.
        params: numbers that a method may train beside the head, in a race or not: sizes are chosen by it.
    """

    minutes: float | None = None
    memory: int | None = None
    steps: int | None = None
    params: int | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What happened at one rung. Plain values only.

    Attributes:
        share: of the steps that were made by then.
        scores: of everyone who was there; None where a run failed.
        kept: who goes on, best first.
        left: who does not, and why: by how much, and what would have changed it.
        seconds: that all runs together had taken by then.
    """

    share: float
    scores: dict[str, float | None]
    kept: tuple[str, ...]
    left: dict[str, str]
    seconds: float


@dataclass(frozen=True)
class Raced:
    """Who won, at which factor of the method's own rate, and why the others left."""

    entrant: Entrant
    factor: float
    decisions: tuple[Decision, ...]
    findings: tuple[str, ...]


def budget_of(words: Sequence[str]) -> Budget:
    """Read `minutes=20`, `memory=8GB`, `steps=400` and `params=100k`.

    >>> budget_of(["minutes=20", "memory=8GB", "params=1.5M"])
    Budget(minutes=20.0, memory=8000000000, steps=None, params=1500000)

    Raises:
        ConfigError: another word, no number, less than one whole, or the same thing twice.
    """
    found, given = Budget(), dict[str, str]()
    for word in words:
        name, _, value = word.partition("=")
        if name in given:
            raise ConfigError(f"--budget {given[name]} and {word}: {name} is one number. Leave one of the two out.")
        given[name] = word
        try:
            if name == "minutes" and 0 < float(value) < math.inf:
                found = replace(found, minutes=float(value))
                continue
            if name == "memory" and (size := re.fullmatch(r"(\d+(?:\.\d+)?) ?([MG])B", value)):
                found = replace(found, memory=_whole(word, size[1], _BYTES[size[2]], "bytes", "memory=8GB"))
                continue
            if name == "steps" and value.isdecimal() and int(value) > 0:
                found = replace(found, steps=int(value))
                continue
            if name == "params" and (size := re.fullmatch(r"(\d+(?:\.\d+)?) ?([kM]?)", value)) and float(size[1]) > 0:
                found = replace(found, params=_whole(word, size[1], _NUMBERS[size[2]], "numbers", "params=100k"))
                continue
        except ValueError:
            pass
        raise ConfigError(
            f"--budget {word}: write minutes=20, memory=8GB, steps=400 or params=100k, several with commas between."
        )
    return found


_BYTES, _NUMBERS = {"M": 10**6, "G": 10**9}, {"": 1, "k": 10**3, "M": 10**6}


def _whole(word: str, digits: str, unit: int, what: str, right: str) -> int:
    """Raises: ConfigError, where it is no whole number of at least one: rounded, it would be another budget."""
    number = Fraction(digits) * unit
    if number < 1 or number.denominator != 1:
        raise ConfigError(
            f"--budget {word}: is {float(number):g} {what}. Write a whole number of them, at least 1, such as {right}."
        )
    return int(number)


def race(asked: Asked, budget: Budget, sweep: Sweep, say: Callable[[str], None], announcing: Announcing) -> Raced:
    """Run it, or go on with it.

    Raises:
        LuthierError: no candidate has a result.
    """
    trials = {
        f"{name} x{trial.factor:.2g}": trial
        for name, own in trials_of(asked.base, asked.entrants, asked.n, sweep.ledger.home, asked.data).items()
        for trial in own
    }
    of = {
        "metric": asked.metric,
        "budget": {n: v for n, v in plain(budget).items() if n in ("minutes", "memory")},
        "cells": {name: t.cell.id for name, t in trials.items()},
    }
    path = sweep.ledger.home / FILE
    made, unfinished = _made(path, of)
    alive, decisions = list(trials), list[Decision]()
    shares = RUNGS[-max(2, min(len(RUNGS), math.ceil(math.log2(len(trials))) + 1)) :]
    rows = round(SELECT_SHARE * len(asked.data.train))
    for number, share in enumerate(shares):
        if number < len(made):
            decisions.append(made[number])
            alive = list(made[number].kept)
            continue
        say(f"race, {share:.0%} of the steps: {several(len(alive), 'candidate')}")
        begun, before = time.monotonic(), decisions[-1].seconds if decisions else 0.0
        earlier = unfinished if number == len(made) else 0.0  # what a call that was ended had spent on this rung
        cells = {name: replace(trials[name].cell, until=share) for name in alive}
        kept = {"of": of, "candidates": list(trials), "decisions": [plain(d) for d in decisions]}

        def spent(earlier: float = earlier, begun: float = begun) -> float:
            return earlier + time.monotonic() - begun

        with _counted(path, kept, announcing(say, len(cells), 0), spent) as said:
            failures = sweep.settle(list(cells.values()), said)
        told = {name: sweep.ledger.result(cell.id) for name, cell in cells.items()}
        why = {n: failures[c.path].message for n, c in cells.items() if c.path in failures}
        took = spent()
        ahead = 0.0  # seconds that one candidate of the next rung takes
        if number + 1 < len(shares):
            ahead = took / len(alive) * (shares[number + 1] - share) / (share - (shares[number - 1] if number else 0.0))
        decision = _decide(_Rung(share, before + took, ahead, rows), told, why, asked.metric, budget, trials)
        if not decision.kept:
            durable.write_json(path, {**kept, "unfinished": round(took, 3)})  # nothing to go on with: tried again
            told_why = "; ".join(f"{name}: {reason}" for name, reason in decision.left.items())
            raise LuthierError(f"race: no candidate has a result. {told_why}")
        decisions.append(decision)
        durable.write_json(path, {**kept, "decisions": [plain(d) for d in decisions]})
        alive = list(decision.kept)
        for name, reason in decision.left.items():
            say(f"{name} leaves: {reason}")
    best = alive[0]
    entrant = next(e for e in asked.entrants if best.rpartition(" x")[0] == e.name)
    return Raced(entrant, trials[best].factor, tuple(decisions), tuple(_findings(best, decisions, rows)))


@dataclass(frozen=True)
class _Rung:
    """Share of the steps, seconds so far, seconds that each of the next rung will take (0 after the last), rows."""

    share: float
    seconds: float
    ahead: float
    rows: int


def _decide(
    rung: _Rung, told: Mapping[str, dict[str, Any] | None], failed: Mapping[str, str], metric: str, budget: Budget,
    trials: Mapping[str, Trial],
) -> Decision:  # fmt: skip
    """Who goes on."""
    scores = {n: None if t is None else float(t["scores"][metric]) for n, t in told.items()}
    left = {name: f"it failed: {why}" for name, why in failed.items()}
    there = {n: t for n, t in told.items() if t is not None}
    for name, one in list(there.items()):
        more = (one.get("peak_bytes") or 0) - (budget.memory or math.inf)
        if more > 0:
            left[name] = (
                f"it needs {human_bytes(one['peak_bytes'])} of memory, {human_bytes(more)} more than the budget; a "
                "smaller --batch may fit"
            )
            del there[name]

    def rank(name: str) -> tuple[float, float, float]:
        found = there[name]["scores"]
        return -float(found[metric]), float(found.get("loss", math.inf)), abs(math.log(trials[name].factor))

    order = sorted(there, key=rank)
    kept = order[: max(1, -(-len(order) // 2))] if rung.ahead else order
    if budget.minutes is not None and rung.ahead:
        while len(kept) > 1 and (end := rung.seconds + rung.ahead * len(kept)) > 60 * budget.minutes:
            left[kept[-1]] = (
                f"with it the next rung would end {human_seconds(end)} after the start, and the budget is "
                f"{budget.minutes:g} minutes"
            )
            kept = kept[:-1]
    for name in order:
        if name not in kept and name not in left:
            left[name] = _by_how_much(name, kept[-1], scores, rung.rows)
    return Decision(share=rung.share, scores=scores, kept=tuple(kept), left=left, seconds=rung.seconds)


def _by_how_much(name: str, last: str, scores: Mapping[str, float | None], rows: int) -> str:
    mine, theirs = scores[name] or 0.0, scores[last] or 0.0
    noise = _noise(theirs, rows)
    gap = theirs - mine
    said = f"{mine:.3f}, {gap:.3f} behind {last}, the last that goes on"
    if gap < noise:
        return f"{said}; {rows} rows move a score by {noise:.3f}, so another seed may have kept it"
    return f"{said}; more than the {noise:.3f} by which {rows} rows move a score: it would have to learn faster later"


def _noise(score: float, rows: int) -> float:
    """Two standard errors of an accuracy on so many rows."""
    return 2 * math.sqrt(max(score * (1 - score), 0.01) / max(1, rows))


def _findings(best: str, decisions: Sequence[Decision], rows: int) -> list[str]:
    end = decisions[-1]
    score = end.scores.get(best) or 0.0
    lines = [
        f"The race of {several(len(decisions[0].scores), 'candidate')} was won by {best}, {score:.3f} on {rows} rows "
        f"of the training half; all runs took {human_seconds(end.seconds)}."
    ]
    second = next((n for n in end.kept[1:] if end.scores.get(n) is not None), None)
    noise = _noise(score, rows)
    if second is not None:
        gap = score - (end.scores[second] or 0.0)
        what = "within what these rows can tell: another seed may turn it" if gap < noise else "more than chance moves"
        lines.append(f"Second was {second}, {gap:.3f} behind: {what} ({noise:.3f}).")
    near = [n for d in decisions[:-1] for n, why in d.left.items() if "another seed" in why]
    if near:
        lines.append(f"{several(len(near), 'candidate')} left by less than chance moves: {', '.join(near[:5])}.")
    return lines


@contextmanager
def _counted(path: Path, kept: Mapping[str, Any], said: Said, spent: Callable[[], float]) -> Iterator[Said]:
    """While a rung is at work, write down after each run what the rung has taken: a kill must not give minutes back."""

    def write() -> None:
        durable.write_json(path, {**kept, "unfinished": round(spent(), 3)})

    def told(cell: Cell, failure: Failure | None, result: Mapping[str, Any]) -> None:
        said(cell, failure, result)
        write()

    try:
        yield told
    except BaseException:
        with suppress(LuthierError):  # a full disk has words of its own
            write()
        raise


def _made(path: Path, of: Mapping[str, Any]) -> tuple[list[Decision], float]:
    """Decisions of an earlier call of the same race: the same runs, metric and budget; and the seconds that it had
    spent on the rung after them."""
    try:
        told = json.loads(path.read_bytes())
        if told["of"] != of:
            names = ", ".join(told["candidates"][:4])
            raise ConfigError(
                f"{path}: is of a race of others ({names}), or of the same with other rows, steps, metric or budget; "
                "what it decided does not hold here. Race into another folder: --out."
            )
        made = [Decision(**{**d, "kept": tuple(d["kept"])}) for d in told["decisions"]]
        return made, float(told.get("unfinished", 0.0))
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0.0

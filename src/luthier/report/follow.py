"""Runs while they go on: each look reads what has been written since the last one, and nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from luthier.core import ConfigError
from luthier.report.gather import names_of, runs_in
from luthier.report.numbers import binned
from luthier.report.read import read_json, state_of, total_steps
from luthier.runs.ledger import Entry, Ledger
from luthier.runs.lock import holder_is_dead

__all__ = ["Follower", "Progress", "spark"]

BARS = "▁▂▃▄▅▆▇█"
MEAN_OF = 20
"""Steps whose losses are averaged for the one that is shown."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a run is.

    Attributes:
        step, total: made, and to be made where that is known.
        loss: mean over the last steps; curve: (step, loss) of all.
        scores: the newest of the held-out rows.
        left: seconds until its last step, where two looks tell how fast it is.
    """

    run: str
    method: str
    seed: int
    state: str
    why: str = ""
    step: int = 0
    total: int | None = None
    loss: float | None = None
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    scores: dict[str, float] = field(default_factory=dict)
    left: float | None = None

    @property
    def going_on(self) -> bool:
        """Whether a process works at it."""
        return self.state == "running"


class Follower:
    """Looks at the runs in a folder, again and again.

    Args:
        folder: of a run, of a comparison, or any that has runs below it.

    Raises:
        ConfigError: it is not there.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ConfigError(f"{folder}: is no folder. Name the folder of a run or of a comparison.")
        self._runs: dict[Path, _Followed] = {}
        self._book: Ledger | None = None

    def look(self) -> list[Progress]:
        """Every run as it is now, those that began meanwhile too.

        Raises:
            IntegrityError: the ledger there is of a newer version, or damaged.
        """
        paths = list(runs_in(self.folder))
        names = names_of(paths)
        for path in paths:
            self._runs.setdefault(path, _Followed(path))
        seen = [self._runs[path].look(names[path]) for path in paths]
        return [*self._told_by_ledger(seen, names), *self._not_begun(paths)]

    def _told_by_ledger(self, seen: Sequence[Progress], names: Mapping[Path, str]) -> list[Progress]:
        """What the ledger says of runs: one whose cell has failed waits for nobody."""
        why = {names.get(self.folder / entry.run): told for entry, told in self._failures()}
        return [
            replace(one, state="failed", why=why[one.run])
            if one.run in why and one.state not in ("finished", "running")
            else one
            for one in seen
        ]

    def _failures(self) -> list[tuple[Entry, str]]:
        ledger = self._ledger()
        if ledger is None:
            return []
        told = [(entry, ledger.failure(entry.id)) for entry in ledger.entries()]
        return [(entry, str(failure.get("message"))) for entry, failure in told if failure is not None]

    def _not_begun(self, paths: Sequence[Path]) -> list[Progress]:
        """Runs that are wanted and have no folder yet."""
        ledger, why = self._ledger(), {entry.id: told for entry, told in self._failures()}
        if ledger is None:
            return []
        return [
            Progress(
                run=Path(entry.run).name, method=str(entry.spec.get("method", "?")),
                seed=int(entry.spec.get("seed") or 0), state=ledger.state(entry.id), why=why.get(entry.id, ""),
            )
            for entry in ledger.entries()
            if self.folder / entry.run not in paths
        ]  # fmt: skip

    def _ledger(self) -> Ledger | None:
        if self._book is None and (self.folder / "ledger" / "ledger.json").is_file():  # else it may come yet
            self._book = Ledger(self.folder)
        return self._book

    def ended(self, seen: Sequence[Progress]) -> bool:
        """Whether nobody works here any more."""
        return not any(one.going_on for one in seen) and not _held(self.folder)


class _Followed:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._facts: list[dict[str, Any]] = []
        self._curve: list[tuple[int, float]] = []
        self._scores: dict[str, float] = {}
        self._total: int | None = None
        self._told = False
        self._spec: dict[str, Any] = {}
        self._record: Any = None
        self._first: tuple[float, int] | None = None

    def look(self, name: str) -> Progress:
        self._read()
        if not self._spec:
            facts, _ = read_json(self.path / "run.json")
            self._spec = facts["spec"] if isinstance(facts, dict) and isinstance(facts.get("spec"), dict) else {}
        if self._spec and not self._told:  # rows.jsonl may come after run.json, and is there when steps are made
            self._total, self._told = total_steps(self.path, self._spec), bool(self._curve)
        if self._record is None and (self.path / "record.json").exists():
            self._record, _ = read_json(self.path / "record.json")
        step = self._curve[-1][0] if self._curve else 0
        if self._total is not None and step > self._total:  # a row may give several examples
            self._total = None
        state, why = state_of(self.path, self._facts)
        if isinstance(self._record, dict):
            state, why = str(self._record.get("status", "finished")), ""
        last = [loss for _, loss in self._curve[-MEAN_OF:]]
        return Progress(
            run=name, method=str(self._spec.get("method", "?")), seed=int(self._spec.get("seed") or 0), state=state,
            why=why, step=step, total=self._total, loss=sum(last) / len(last) if last else None,
            curve=tuple(self._curve), left=self._left(step) if state == "running" else None, scores=dict(self._scores),
        )  # fmt: skip

    def _left(self, step: int) -> float | None:
        """Seconds to the last step, by what was made since the first look."""
        now = time.monotonic()
        if self._first is None or step < self._first[1]:
            self._first = (now, step)
        begun, at = self._first
        if self._total is None or step == at or now == begun:
            return None
        return max(0, self._total - step) * (now - begun) / (step - at)

    def _read(self) -> None:
        file = self.path / "events.jsonl"
        try:
            size = file.stat().st_size
            if size < self._at:  # a resumed run has cut rows that it writes again
                self._at, self._facts, self._curve, self._scores = 0, [], [], {}
            with file.open("rb") as stream:
                stream.seek(self._at)
                whole, end, _ = stream.read().rpartition(b"\n")
        except OSError:
            return
        self._at += len(whole) + len(end)
        for raw in whole.split(b"\n") if end else ():
            try:
                line = json.loads(raw)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                self._take(line)

    def _take(self, line: dict[str, Any]) -> None:
        kind, step, loss = line.get("event"), line.get("step"), line.get("loss")
        if kind == "step" and isinstance(step, int) and isinstance(loss, int | float):
            while self._curve and self._curve[-1][0] >= step:
                self._curve.pop()
            self._curve.append((step, float(loss)))
        elif kind == "scores":
            self._scores = {
                k: float(v) for k, v in line.items() if k not in ("event", "step") and isinstance(v, int | float)
            }
        elif kind == "begins" and isinstance(line.get("total"), int):
            self._total, self._told = line["total"], True
        elif "at" in line:
            self._facts.append(line)


def spark(curve: Sequence[tuple[int, float]], width: int = 16) -> str:
    """A curve in one line of text.

    >>> spark([(1, 4.0), (2, 3.0), (3, 1.0), (4, 0.5)], 4)
    '█▆▂▁'
    """
    values = [value for _, value in binned(curve, width)]
    if not values:
        return ""
    low, wide = min(values), max(values) - min(values)
    return "".join(BARS[round((v - low) / wide * (len(BARS) - 1))] if wide else BARS[0] for v in values)


def _held(folder: Path) -> bool:
    holder, _ = read_json(folder / "run.lock")
    return isinstance(holder, dict) and bool(holder) and not holder_is_dead(holder)

"""What a run's folder holds, for a reader who changes nothing in it. No folder makes it fail: what is wrong is said."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luthier.comparison import Answers, answers_of
from luthier.core import LuthierError
from luthier.runs import Journal, Record
from luthier.runs.lock import holder_is_dead
from luthier.runs.spec import RunSpec

__all__ = ["Run", "read_json", "read_run", "state_of", "total_steps"]

CELL = re.compile(r"(?P<name>.+)-seed(?P<seed>\d+)-[0-9a-f]{10}")
"""A folder of a comparison: method, seed, digest of the spec."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run as its folder tells it.

    Attributes:
        name: how the page calls it; no two runs of a page have one name.
        method: what stands for it in charts: the method, with its settings where it stands more than once.
        state: "finished", or what else became of it; `why` says more where that is bad.
        steps: (step, loss) of every step; scored: (step, scores) each time that held-out rows were scored.
    """

    name: str
    path: Path
    method: str
    seed: int = 0
    state: str = "finished"
    why: str = ""
    spec: dict[str, Any] = field(default_factory=dict)
    record: Record | None = None
    quality: dict[str, Any] | None = None
    answers: Answers | None = None
    steps: tuple[tuple[int, float], ...] = ()
    scored: tuple[tuple[int, dict[str, float]], ...] = ()

    @property
    def finished(self) -> bool:
        """Whether it has a record that can be read."""
        return self.record is not None

    @property
    def data(self) -> str:
        """The rows it learnt from, as they were named."""
        return str(self.spec.get("data", {}).get("source", "?"))


def read_run(path: Path, name: str, method: str = "", why: str = "") -> Run:
    """Read one run.

    Args:
        name: what the page calls it.
        method: what charts call it; left out, its spec's method.
        why: why a comparison says that it has no result.
    """
    cell = CELL.fullmatch(path.name)
    told: dict[str, Any] = {"method": method or (cell["name"] if cell else path.name)}
    told["seed"] = int(cell["seed"]) if cell else 0
    if not path.is_dir():
        state = "failed" if why else "deleted"
        return Run(name=name, path=path, state=state, why=why or "its folder is not there any more", **told)
    facts, wrong = read_json(path / "run.json")
    if not isinstance(facts, dict) or not isinstance(facts.get("spec"), dict):
        return Run(name=name, path=path, state="unreadable", why=wrong or "run.json is no run's", **told)
    spec = facts["spec"]
    told |= {"method": method or str(spec.get("method", "?")), "seed": _whole(spec.get("seed")), "spec": spec}
    events = list(Journal(path / "events.jsonl"))
    told["steps"] = tuple(_losses(events))
    told["scored"] = tuple(_scored(events))
    if not (path / "record.json").exists():
        state, said = state_of(path, events)
        return Run(name=name, path=path, state="failed" if why else state, why=why or said, **told)
    try:
        record = Record.from_json((path / "record.json").read_bytes())
    except (LuthierError, OSError) as error:
        return Run(name=name, path=path, state="unreadable", why=str(error), **told)
    quality, _ = read_json(path / "quality.json") if (path / "quality.json").exists() else (None, "")
    try:
        answers = answers_of(path) if (path / "predictions.csv").exists() else None
        said = ""
    except LuthierError as error:
        answers, said = None, str(error)
    told["quality"] = quality if isinstance(quality, dict) else None
    return Run(name=name, path=path, state=record.status, why=said, record=record, answers=answers, **told)


def state_of(path: Path, events: Iterable[dict[str, Any]]) -> tuple[str, str]:
    """What became of a run that has no record, and what it needs.

    Returns:
        a word, and a sentence or nothing.
    """
    last: dict[str, Any] = next(
        (e for e in reversed(list(events)) if e.get("event") in (*_ENDS, "resumed", "created")), {}
    )
    kind = str(last.get("event"))
    if kind in ("diverged", "wrong_arithmetic"):
        return "diverged", f"{_ENDS[kind]} at step {last.get('step')}: {last.get('reason', 'see events.jsonl')}"
    holder, _ = read_json(path / "run.lock") if (path / "run.lock").exists() else ({}, "")
    if isinstance(holder, dict) and holder:
        if not holder_is_dead(holder):
            return "running", ""
        return "killed", f"its process is gone; go on: luthier resume {path}"
    if kind in _ENDS:
        return "stopped", f"{_ENDS[kind]} at step {last.get('step')}; go on: luthier resume {path}"
    return "unfinished", f"go on: luthier resume {path}"


_ENDS = {
    "diverged": "numbers went wrong", "wrong_arithmetic": "wrong arithmetic", "interrupted": "interrupted",
    "paused": "paused",
}  # fmt: skip


def total_steps(run: Path, spec: dict[str, Any]) -> int | None:
    """How many steps a run will make; None where its folder does not say, as where a strategy chooses its rows."""
    if isinstance(spec.get("steps"), int):
        return int(spec["steps"])
    if spec.get("strategy"):
        return None
    try:
        read = RunSpec.from_plain(spec)
        lines = (run / "rows.jsonl").read_bytes().split(b"\n")
    except (LuthierError, OSError):
        return None
    used = sum(line.startswith(b'{"half": "train"') and b'"refused"' not in line for line in lines)
    return read.total_steps(-(-used // read.batch.size)) if used else None


def read_json(path: Path) -> tuple[Any, str]:
    """What a file holds, and nothing; or nothing, and what is wrong with it."""
    try:
        return json.loads(path.read_bytes()), ""
    except OSError as error:
        return None, f"{path.name} cannot be read ({error.strerror})"
    except (ValueError, RecursionError) as error:
        return None, f"{path.name} is not JSON ({error})"


def _whole(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _numbers(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _losses(events: Iterable[dict[str, Any]]) -> Iterable[tuple[int, float]]:
    for e in events:
        if e.get("event") == "step" and _numbers(e.get("step")) and _numbers(e.get("loss")):
            yield int(e["step"]), float(e["loss"])


def _scored(events: Iterable[dict[str, Any]]) -> Iterable[tuple[int, dict[str, float]]]:
    skip: Callable[[str], bool] = ("event", "step", "at").__contains__
    for e in events:
        if e.get("event") == "scores" and _numbers(e.get("step")):
            yield int(e["step"]), {k: float(v) for k, v in e.items() if not skip(k) and _numbers(v)}

"""Runs contests: the contestants of a case take turns, each time in a new process; medians and spreads come out.

A B C  A B C  A B C      and not A A A  B B B  C C C: a slow minute of the machine hits all of them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import _machine

__all__ = ["Case", "Contestant", "contest", "summary"]

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Contestant:
    """One way of doing the work of a case: a function below `benchmarks`, its arguments and its environment."""

    name: str
    module: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One piece of work and who does it. The first contestant is what the others are compared with."""

    name: str
    title: str
    contestants: tuple[Contestant, ...]
    repeats: int = 3
    unit: str = "rows_per_second"
    higher_is_better: bool = True
    notes: tuple[str, ...] = ()


def contest(
    case: Case, *, threads: int | None, repeats: int | None, limit: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run a case and give its record: every run, and the summary of each contestant.

    Args:
        threads: of each process; None leaves it to torch.
        repeats: in place of the case's own.
        limit: seconds after which a process is ended and its run counts as failed.
    """
    runs: dict[str, list[dict[str, Any]]] = {c.name: [] for c in case.contestants}
    for turn in range(repeats or case.repeats):
        for contestant in case.contestants:
            if any("error" in r for r in runs[contestant.name]):
                continue  # what fails once fails again, and costs minutes
            found = _one(contestant, turn, threads, limit)
            runs[contestant.name].append(found)
            value = found.get("error") or f"{found.get(case.unit, float('nan')):.4g} {case.unit}"
            say(f"{case.name} {turn + 1}/{repeats or case.repeats} {contestant.name}: {value}")
    return {
        "case": case.name,
        "title": case.title,
        "unit": case.unit,
        "higher_is_better": case.higher_is_better,
        "notes": list(case.notes),
        "contestants": [
            {**asdict(c), "summary": summary(runs[c.name]), "runs": runs[c.name]} for c in case.contestants
        ],
    }


def _one(contestant: Contestant, turn: int, threads: int | None, limit: float) -> dict[str, Any]:
    share = _machine.busy_share(0.5)
    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as folder:
        job, result, log = (Path(folder) / name for name in ("job.json", "result.json", "log"))
        # A seed of "turn" is another one in each turn, and the same for all contestants.
        arguments = {n: turn if v == "turn" else v for n, v in contestant.arguments.items()}
        job.write_text(json.dumps({**asdict(contestant), "arguments": arguments, "threads": threads}))
        # Waiting threads as the library comes: putting them to sleep (OMP_WAIT_POLICY=PASSIVE) cost the contestant with
        # the most small operations a third of its speed on an idle machine, and the others a twentieth.
        env = {**os.environ, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1", **contestant.environment}
        command = [sys.executable, "-m", "benchmarks._child", str(job), str(result)]
        with log.open("wb") as out:
            try:
                subprocess.run(command, cwd=ROOT, env=env, stdout=out, stderr=out, timeout=limit, check=False)
            except subprocess.TimeoutExpired:
                return {"error": f"not done after {limit:g} seconds", "busy_before": share}
        if not result.exists():
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            return {"error": f"the process died: {' '.join(tail)}", "busy_before": share}
        found: dict[str, Any] = json.loads(result.read_text())
        return {**found, "busy_before": round(share, 3)}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and most of every number that all runs have; and the error, if one ended a run."""
    errors = [r["error"] for r in runs if "error" in r]
    if errors or not runs:
        return {"error": errors[0] if errors else "no run"}
    names = [n for n, v in runs[0].items() if isinstance(v, int | float) and not isinstance(v, bool)]
    found: dict[str, Any] = {"n": len(runs)}
    for name in names:
        values = [r[name] for r in runs if isinstance(r.get(name), int | float)]
        if len(values) == len(runs):
            found[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return found

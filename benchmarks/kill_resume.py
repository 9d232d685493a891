"""Kill real training runs with SIGKILL at ten random moments each, resume every time, compare with the undisturbed run.

    python benchmarks/kill_resume.py                    all cases, figures into docs/reliability.md
    python benchmarks/kill_resume.py --only adalora     one case

Moments are drawn with a seed, over loading and training alike; a child that is killed is a process of its own.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _killed
import _marks

from luthier.core import human_seconds
from luthier.runs.spec import BatchSpec, CheckpointSpec, DataSpec, RunSpec
from luthier.testing import Template

KILLS = 10


def spec_of(model: str, method: str, out: Path) -> RunSpec:
    """Few steps and short texts: what counts is how many moments there are, not what is learnt."""
    big = method == "diff_pruning"  # half a gigabyte a checkpoint
    common: dict[str, Any] = {
        "model": f"sample:{model}", "method": method, "threads": 1, "out": str(out), "precision": "fp32",
        "trunk_dropout": "on", "checkpoint": CheckpointSpec(every_steps=4 if big or model == "smollm2-135m" else 2),
    }  # fmt: skip
    if model == "smollm2-135m":
        data = DataSpec(source="sample:chitchat", test_share=0.01, accept_refused=0.5)
        return RunSpec(data=data, steps=20, max_length=48, batch=BatchSpec(size=2, tokens=48), **common)
    data = DataSpec(source="sample:trec6")
    return RunSpec(data=data, steps=24 if big else 60, batch=BatchSpec(size=16, tokens=128), **common)


CASES = [
    ("minilm-l6", "prefix_tuning"),
    ("minilm-l6", "adalora"),
    ("minilm-l6", "adamix"),
    ("minilm-l6", "diff_pruning"),
    ("smollm2-135m", "lora"),
]


def case(template: Template, model: str, method: str, seed: int, home: Path) -> dict[str, Any]:
    """One case; stops the program where a child ends otherwise than it should."""
    draw = random.Random(f"{seed} {model} {method}")

    def child(spec: RunSpec, **when: Any) -> int:
        given = {"spec": _killed.as_json(spec), **when}
        outcome = template.run(_killed.HERE, "begin_or_resume", given, timeout_s=3600)
        if outcome.status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{model} {method}: a child ended with {outcome.status}\n{outcome.output}")
        return outcome.status

    begun = time.monotonic()
    whole = spec_of(model, method, home / "whole")
    if child(whole) != 0:
        raise SystemExit("the undisturbed run did not finish")
    seconds, steps = time.monotonic() - begun, whole.steps or 1
    training = min(seconds, json.loads((home / "whole" / "record.json").read_text())["seconds"])
    killed, at = spec_of(model, method, home / "killed"), [0]
    finished = False
    while len(at) <= KILLS and not finished:
        if draw.random() < 0.2:  # while it loads
            when = {"steps": 0, "delay": draw.uniform(0, seconds - training)}
        else:  # between one and so many steps that the run is not over before the last kill; then some moment after
            most = int(1.5 * (steps - at[-1]) / (KILLS + 2 - len(at)))
            when = {"steps": draw.randint(1, max(1, most)), "delay": draw.uniform(0, 1.5 * training / steps)}
        finished = child(killed, number=signal.SIGKILL, **when) == 0
        if not finished:
            at.append(_killed.steps_done(home / "killed"))
    if not finished and child(killed) != 0:
        raise SystemExit("the last resume did not finish")
    expected, found = _killed.digests(home / "whole"), _killed.digests(home / "killed")
    return {
        "model": model, "method": method, "steps": whole.steps, "kills": len(at) - 1, "at": at[1:],
        "equal": [part for part in expected if expected[part] == found[part]],
        "differ": [part for part in expected if expected[part] != found[part]], "seconds": seconds,
    }  # fmt: skip


def record(model: str, method: str, row: str, seed: int) -> None:
    """Put one case's row on the page; the rows of other cases stay as they are."""
    mark = f"| {model} | {method} |"
    rows = [line for line in _marks.read_block("kill_resume") if line.startswith("| ") and not line.startswith(mark)]
    head = ["| model | method | steps | SIGKILLs | steps in the log at each kill | equal to the undisturbed run |",
            "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    rows = sorted([*(r for r in rows if r not in head), row])
    _marks.write_block("kill_resume", [*head, *rows, "", f"Seed {seed}; `python benchmarks/kill_resume.py`."])


def main() -> int:
    """Run the cases; exit code 1 where a digest differs or a run was over before its tenth kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a method or a model")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    cases = [c for c in CASES if asked.only is None or asked.only in c]
    bad = 0
    with Template(_killed.PRELOAD) as template:
        for model, method in cases:
            home = Path(tempfile.mkdtemp(prefix="luthier-kill-"))
            try:
                found = case(template, model, method, asked.seed, home)
            finally:
                shutil.rmtree(home, ignore_errors=True)
            same = "yes: " + ", ".join(found["equal"]) if not found["differ"] else f"NO: {', '.join(found['differ'])}"
            row = (
                f"| {model} | {method} | {found['steps']} | {found['kills']} | "
                f"{', '.join(map(str, found['at']))} | {same} |"
            )
            print(row, f"({human_seconds(found['seconds'])} undisturbed)", flush=True)
            record(model, method, row, asked.seed)
            bad += bool(found["differ"]) or found["kills"] < KILLS
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

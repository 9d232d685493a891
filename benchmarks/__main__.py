"""Measure, and draw what was measured.

    python -m benchmarks                     everything, about two hours on two cores, at least three times each
    python -m benchmarks --quick             a few minutes; enough to see that all of it works
    python -m benchmarks --only decoder      one group (several: --only decoder --only floor)
    python -m benchmarks --processor         on a busy machine: one thread, and the seconds of its processor
    python -m benchmarks --only gpu          models of 1 and 8 billion numbers, where there is a GPU
    python -m benchmarks --draw              docs/benchmarks.md and its plots, from the results that are there
    python -m benchmarks --profile encoder   where the time and memory of a training run go

Results go to benchmarks/results/, those of --quick to benchmarks/results/quick/; each run draws the page anew.
"""

import argparse
import json
import os
import sys
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any

from benchmarks import _machine
from benchmarks._page import RESULTS, draw
from benchmarks._plan import GROUPS, plan
from benchmarks._suite import Case, contest
from benchmarks._work import PROCESSOR


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="short cases, few repeats")
    parser.add_argument("--only", action="append", default=[], choices=list(GROUPS), help="this group; may be repeated")
    parser.add_argument("--case", action="append", default=[], help="of the groups, only this case; may be repeated")
    parser.add_argument(
        "--contestant",
        action="append",
        default=[],
        help="of the cases, only this contestant and the first, which it is compared with; nothing is written",
    )
    parser.add_argument("--busy", action="store_true", help="measure on a busy machine; marks the results")
    parser.add_argument(
        "--processor", action="store_true", help="one thread, and its processor's seconds: for a busy machine"
    )
    parser.add_argument("--threads", type=int, default=None, help="of each process; left out, as torch chooses")
    parser.add_argument("--repeats", type=int, default=None, help="in place of each case's own number")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which one process is given up")
    parser.add_argument("--draw", action="store_true", help="only draw the page from the results that are there")
    parser.add_argument("--profile", choices=["encoder", "decoder"], help="only profile luthier's training")
    words = parser.parse_args()
    if words.draw:
        print(draw())
        return 0
    if words.profile:
        from benchmarks import _profile

        print(_profile.table(words.profile, words.threads))
        print(_profile.saved(words.profile))
        return 0
    share = _machine.busy_share(3.0)
    complaint = None if words.processor else _machine.idle_complaint(share)
    if words.processor:
        words.threads = 1
        os.environ[PROCESSOR] = "1"
    if complaint is not None and not words.busy:
        print(complaint, file=sys.stderr)
        return 1
    folder = RESULTS / "quick" if words.quick else RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    planned = plan(words.quick, tuple(words.only))
    for group in set(words.only) - set(planned):
        why = "there is no GPU here" if group == "gpu" and not words.quick else "it has no short cases"
        print(f"{group}: nothing is measured, {why}", file=sys.stderr)
    names = [case.name for cases in planned.values() for case in cases]
    if unknown := [name for name in words.case if name not in names]:
        print(f"no case is called {', '.join(unknown)}; there are {', '.join(names)}", file=sys.stderr)
        return 2
    if words.contestant:
        meant = [case for case in chain(*planned.values()) if not words.case or case.name in words.case]
        return _compared(meant, words)
    for group, all_cases in planned.items():
        cases = [case for case in all_cases if not words.case or case.name in words.case]
        if not cases:
            continue
        before = _machine.environment(words.threads)
        started = datetime.now(UTC).isoformat(timespec="seconds")
        target = folder / f"{group}.json"
        old = json.loads(target.read_text()) if words.case and target.exists() else None
        records: list[dict[str, Any]] = []
        for case in cases:
            say = partial(print, flush=True)
            records.append(contest(case, threads=words.threads, repeats=words.repeats, limit=words.limit, say=say))
            kept = records if old is None else _beside(old, before, records, [one.name for one in all_cases])
            found = {
                "group": group,
                "quick": words.quick,
                "busy": complaint is not None or (not words.processor and _was_busy(records)),
                "processor": words.processor,
                "busy_share_at_start": round(share, 3),
                "started": started,
                "environment": before,
                "cases": kept,
            }
            target.write_text(json.dumps(found, indent=1) + "\n")  # after each: a group takes hours
        failed += sum("error" in one["summary"] for record in records for one in record["contestants"])
    print(draw())
    if failed:
        print(f"{failed} contestants failed; the page says which and why", file=sys.stderr)
    return 0


def _compared(cases: list[Case], words: argparse.Namespace) -> int:
    """Each asked contestant beside the first of its case: a line with both steps. What a group has measured stays."""
    for case in cases:
        first, *others = case.contestants
        chosen = [one for one in others if one.name in words.contestant]
        if not chosen:
            continue
        short = replace(case, contestants=(first, *chosen))
        record = contest(
            short, threads=words.threads, repeats=words.repeats, limit=words.limit, say=partial(print, flush=True)
        )
        steps = {one["name"]: one["summary"].get("step_seconds", {}).get("median") for one in record["contestants"]}
        for name in (one.name for one in chosen):
            if steps[name] and steps[first.name]:
                ratio = steps[name] / steps[first.name]
                print(f"{case.name} {name}: {steps[name]:.4g} s a step, {ratio:.2f} of {first.name}'s")
    known = {one.name for case in cases for one in case.contestants}
    unknown = sorted(set(words.contestant) - known)
    if unknown:
        print(f"no contestant is called {', '.join(unknown)}; there are {', '.join(sorted(known))}", file=sys.stderr)
    return 2 if unknown else 0


def _was_busy(records: list[dict[str, Any]]) -> bool:
    """Whether other work ran before one of the runs."""
    runs = (run for record in records for one in record["contestants"] for run in one["runs"])
    return any(_machine.idle_complaint(run["busy_before"]) is not None for run in runs if "busy_before" in run)


_SAME = ("cpu", "cpus", "threads", "luthier", "torch", "transformers", "peft")


def _beside(
    old: dict[str, Any], environment: dict[str, Any], records: list[dict[str, Any]], order: list[str]
) -> list[dict[str, Any]]:
    """The new records, with those of the group's other cases that were taken in the same environment."""
    if (
        old["busy"]
        or old.get("processor", False) != bool(os.environ.get(PROCESSOR))
        or any(old["environment"].get(name) != environment.get(name) for name in _SAME)
    ):
        return records
    known = {case["case"]: case for case in [*old["cases"], *records]}
    return [known[name] for name in order if name in known]


if __name__ == "__main__":
    raise SystemExit(main())

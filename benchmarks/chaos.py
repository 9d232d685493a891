"""Disturb runs of a tiny model with 500 random faults, resume after each, compare with the run that nothing disturbed.

    python benchmarks/chaos.py                 500 faults, figures into docs/reliability.md
    python benchmarks/chaos.py --faults 40     fewer, printed only

Faults: SIGKILL and SIGTERM at random moments; SIGKILL, a full disk, a failing disk or power loss at a random durable
operation; a random flipped bit, cut or removed file in the newest checkpoint between two attempts.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT / "tests")]
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])

import _killed  # noqa: E402
import _marks  # noqa: E402
from little import little_spec  # noqa: E402

from luthier.runs import RunFolder, checkpoints  # noqa: E402
from luthier.runs.spec import BatchSpec, CheckpointSpec, EvalSpec, RunSpec  # noqa: E402
from luthier.testing import Outcome, Template, damage  # noqa: E402

METHODS = ("lora", "adalora", "adamix", "diff_pruning", "propetl")
EXPECTED = {
    0: "not disturbed",
    5: "stopped with exit code 5",
    143: "stopped with exit code 143",
    -signal.SIGKILL: "killed",
    -signal.SIGTERM: "ended by SIGTERM while loading",
}
AT_OPERATION = ("kill", "enospc", "eio", "drop", "drop-names", "drop-bytes")
FAULTS_A_RUN = 10


def spec_of(home: Path, method: str, out: Path) -> RunSpec:
    """60 steps, evaluated and saved often, so that faults fall into everything."""
    return little_spec(
        home, method, steps=60, out=str(out), eval=EvalSpec(every=7, best=True),
        checkpoint=CheckpointSpec(every_steps=4), batch=BatchSpec(size=8, tokens=48, accumulate=2, workers=2),
    )  # fmt: skip


def attempt(template: Template, spec: RunSpec, draw: random.Random, whole_seconds: float) -> tuple[str, str, Outcome]:
    """One attempt with one fault: its kind, the fault in full, and how the child ended."""
    given: dict[str, object] = {"spec": _killed.as_json(spec)}
    kind = draw.choice(["SIGKILL", "SIGTERM", "damage", *AT_OPERATION])
    fault = ""
    if kind in AT_OPERATION:
        scope = draw.choice(["save", "prune", "event", "rewind", "*"])
        fault = f"{scope}:{draw.randint(1, 40)}:{kind}"
    else:  # at some moment while it loads, or after some steps
        number = signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL
        given |= {"number": number, "steps": draw.randint(0, 12), "delay": draw.uniform(0, 0.1) * whole_seconds}
    outcome = template.run(_killed.HERE, "begin_or_resume", given, fault=fault, timeout_s=300)
    out = Path(str(spec.out))
    # Before the loop begins and after it has ended there is nothing to save, and SIGTERM does what it always does.
    idle = kind == "SIGTERM" and (given["steps"] == 0 or (out / "record.json").exists())
    if outcome.status == -signal.SIGTERM and not idle:
        outcome = Outcome(1, f"SIGTERM was not caught\n{outcome.output}")
    if kind == "damage" and (out / "run.json").exists() and not (out / "record.json").exists():
        found = checkpoints(RunFolder.open(out, write=False))
        if len(found) > 1:  # with one alone the run would stop, as it should
            files = [p for p in found[0].iterdir() if p.is_file()]
            done = damage(files, draw, ("flip", "byte", "cut", "grow", "zero", "remove"))
            return kind, f"SIGKILL, then {done.kind} of {found[0].name}/{done.path.name}", outcome
        kind = "SIGKILL"
    elif kind == "damage":
        kind = "SIGKILL"
    return kind, fault or f"{kind} {given['delay']:.2f} s after step {given['steps']}", outcome


def main() -> int:
    """Exit code 1 where a run ended with other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    wanted, draw = asked.faults or 500, random.Random(asked.seed)
    kinds: Counter[str] = Counter()
    ends: Counter[int] = Counter()
    runs = equal = odd = 0
    home = Path(tempfile.mkdtemp(prefix="luthier-chaos-"))
    try:
        with Template((*_killed.PRELOAD, "little")) as template:
            wholes: dict[str, tuple[dict[str, str], float]] = {}
            while sum(kinds.values()) < wanted:
                method = METHODS[runs % len(METHODS)]
                if method not in wholes:
                    wholes[method] = undisturbed(template, home, method)
                expected, seconds = wholes[method]
                out, story, after = home / f"run-{runs}", [], 0
                while after < FAULTS_A_RUN and not (out / "record.json").exists() and sum(kinds.values()) < wanted:
                    kind, fault, outcome = attempt(template, spec_of(home, method, out), draw, seconds)
                    story.append(f"  {fault}: {outcome.status}")
                    if outcome.status not in EXPECTED:
                        odd += 1
                        print(f"{method} after {fault}: ended with {outcome.status}\n{outcome.output}", flush=True)
                    if outcome.status != 0:  # else the run was over before the fault, or a full disk was made room on
                        kinds[kind] += 1
                        ends[outcome.status] += 1
                        after += 1
                if not (out / "record.json").exists():
                    given = {"spec": _killed.as_json(spec_of(home, method, out))}
                    last = template.run(_killed.HERE, "begin_or_resume", given, timeout_s=300)
                    if last.status != 0:
                        raise SystemExit(f"{method}: the last attempt ended with {last.status}\n{last.output}")
                runs += 1
                found = _killed.digests(out)
                equal += found == expected
                differ = [part for part in expected if found[part] != expected[part]]
                said = f"NOT EQUAL: {', '.join(differ)}" if differ else "equal"
                print(f"{method}: {after} faults, {said}; {sum(kinds.values())} in all", flush=True)
                if differ:
                    print("\n".join(story), flush=True)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    lines = [
        f"{sum(kinds.values())} faults over {runs} runs of {', '.join(METHODS)}: {equal} of {runs} ended with the "
        "digests of the undisturbed run.",
        "",
        "Faults: " + ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()) + ".",
        "Attempts: "
        + ", ".join(f"{n} {EXPECTED.get(end, f'ended with {end}')}" for end, n in ends.most_common())
        + f"; {odd} ended in an unexpected way.",
        "",
        f"Seed {asked.seed}; `python benchmarks/chaos.py`.",
    ]
    print("\n".join(lines))
    if asked.faults is None:
        _marks.write_block("chaos", lines)
    return 0 if equal == runs and not odd else 1


def undisturbed(template: Template, home: Path, method: str) -> tuple[dict[str, str], float]:
    """Digests of the run that nothing disturbs, and how long it took."""
    out, begun = home / f"whole-{method}", time.monotonic()
    given = {"spec": _killed.as_json(spec_of(home, method, out))}
    done = template.run(_killed.HERE, "begin_or_resume", given, timeout_s=300)
    if done.status != 0:
        raise SystemExit(f"{method}: the undisturbed run ended with {done.status}\n{done.output}")
    return _killed.digests(out), time.monotonic() - begun


if __name__ == "__main__":
    raise SystemExit(main())

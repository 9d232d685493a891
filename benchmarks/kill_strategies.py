"""Kill runs of ten strategies with eight methods, and a recipe in the second of its phases; resume; compare.

    python benchmarks/kill_strategies.py                    all cases, figures into docs/reliability.md
    python benchmarks/kill_strategies.py --only mezo        one case

Each is killed twice with SIGKILL so many steps after it was begun or resumed, and a part of a step later, drawn
with a seed. Compared are digests of the trained tensors, the optimiser's state, what the strategies remember, the saved
tuning and the log's rows. minilm-l3, 160 rows of trec6, eight steps, a checkpoint every second one.
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import _killed
import _marks

from luthier.data.rows import load_rows
from luthier.runs.spec import BatchSpec, CheckpointSpec, DataSpec, OptimSpec, RunSpec
from luthier.testing import Template

KILLS, STEPS, ROWS = 2, 8, 160
KINDS = (("equal", True), ("differ", False))


@dataclass(frozen=True)
class Case:
    """A strategy with a method.

    Attributes:
        also: further sets, of rows that are written beside.
        phases: of a recipe, the folders of its three; it is killed in the second, and the last two are compared.
    """

    method: str
    strategy: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[str, ...] = ()
    lr: float | None = None
    phases: tuple[str, ...] = ()


CASES = (
    Case("lora", "freelb+llrd"),
    Case("full", "recadam", {"recadam.t0": 4}, lr=5e-5),
    Case("dora", "self_ensemble"),
    Case("full", "lisa", {"lisa.every": 2}, lr=5e-5),
    Case("layernorm_tuning", "gradual_unfreeze+stlr", {"gradual_unfreeze.every": 2}),
    Case("bitfit", "r_drop"),
    Case("ia3", "mtl_sampling", also=("old",)),
    Case("prefix_tuning", "replay+ema", {"ema.decay": 0.9}, also=("old",)),
    Case("adalora", "cosine_ws", {"cosine_ws.init": 0.4, "cosine_ws.refresh": 2, "cosine_ws.threshold": 0.0}),
    Case("full", "mezo", lr=1e-6),
    Case(
        "lora",
        "ulmfit",
        {"ulmfit.texts_epochs": 1.0, "gradual_unfreeze.every": 2},
        also=("general",),
        phases=("1-general", "2-texts", "3-task"),
    ),
)


def spec_of(case: Case, rows: Path, out: Path) -> RunSpec:
    """Few steps and short texts: what counts is what is remembered between steps, not what is learnt."""
    return RunSpec(
        model="sample:minilm-l3", method=case.method, strategy=case.strategy, settings=dict(case.settings),
        data=DataSpec(source=str(rows / "rows.jsonl"), test_share=0.2), steps=STEPS, out=str(out), threads=1,
        also=tuple(f"{n}={rows / ('general.jsonl' if n == 'general' else 'others.jsonl')}" for n in case.also) or None,
        precision="fp32",
        batch=BatchSpec(size=16, tokens=4096), optim=OptimSpec(lr=case.lr), checkpoint=CheckpointSpec(every_steps=2),
    )  # fmt: skip


def write_rows(home: Path) -> None:
    """Questions of trec6: those that are learnt, and others."""
    table, _ = load_rows("sample:trec6")
    for name, part in (("rows", table.rows[:ROWS]), ("others", table.rows[ROWS : ROWS + 80])):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    texts = "".join(json.dumps({"text": row["text"]}) + "\n" for row in table.rows[ROWS : ROWS + 80])
    (home / "general.jsonl").write_text(texts, encoding="utf-8")


def tried(template: Template, case: Case, home: Path, seed: int) -> dict[str, Any]:
    """One case; stops the program where a child ends otherwise than it should."""
    draw = random.Random(f"{seed} {case.method} {case.strategy}")

    def child(out: Path, **when: Any) -> int:
        given = {"spec": _killed.as_json(spec_of(case, home, out)), **when}
        outcome = template.run(_killed.HERE, "begin_or_resume", given, timeout_s=3600)
        if outcome.status not in (0, -signal.SIGKILL):
            raise SystemExit(f"{case}: a child ended with {outcome.status}\n{outcome.output}")
        return outcome.status

    if child(home / "whole") != 0:
        raise SystemExit(f"{case}: the undisturbed run did not finish")
    before, *parts = case.phases or ("", "")
    first = _killed.steps_done(home / "whole" / before) if case.phases else 0
    at: list[int] = []
    for number in range(KILLS):
        steps = draw.randint(2, 3) + (first if number == 0 else 0)
        if child(home / "killed", number=signal.SIGKILL, steps=steps, delay=draw.uniform(0, 0.3)) == 0:
            break
        at.append(_killed.steps_done(home / "killed" / parts[0]))
        if any((home / "killed" / later).exists() for later in parts[1:]):
            raise SystemExit(f"{case}: it was killed behind its second phase")
    else:
        child(home / "killed")
    expected, found = ([_killed.digests(home / name / part) for part in parts] for name in ("whole", "killed"))
    equal = {what: all(one[what] == other.get(what) for one, other in zip(expected, found, strict=True))
             for what in expected[0]}  # fmt: skip
    return {"at": at, **{word: [what for what in equal if equal[what] == same] for word, same in KINDS}}


def main() -> int:
    """Run the cases; exit code 1 where a digest differs or a run was over before its last kill."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a method or a strategy")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    head = ["| method | strategy | SIGKILLs, at steps | equal to the undisturbed run |", "| --- | --- | --- | --- |"]
    lines, bad = [], 0
    with Template(_killed.PRELOAD) as template:
        for case in CASES:
            if asked.only not in (None, case.method, *case.strategy.split("+")):
                continue
            home = Path(tempfile.mkdtemp(prefix="luthier-kill-"))
            try:
                write_rows(home)
                found = tried(template, case, home, asked.seed)
            finally:
                shutil.rmtree(home, ignore_errors=True)
            same = "yes: " + ", ".join(found["equal"]) if not found["differ"] else f"NO: {', '.join(found['differ'])}"
            of = f"{case.strategy}, in the second of its three phases" if case.phases else case.strategy
            lines.append(f"| {case.method} | {of} | {', '.join(map(str, found['at']))} | {same} |")
            print(lines[-1], flush=True)
            bad += bool(found["differ"]) or len(found["at"]) < KILLS
    if asked.only is None:
        _marks.write_block(
            "kill_strategies", [*head, *lines, "", f"Seed {asked.seed}; `python benchmarks/kill_strategies.py`."]
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())

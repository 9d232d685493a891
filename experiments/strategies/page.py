"""From the results: `docs/strategies-table.md`, and what `luthier strategies NAME` says of them.

The second is a file of the package, `luthier/strategies/measured.json`: strategy -> a sentence for each scene.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import known
from experiments.strategies.scenes import SCENES
from experiments.strategies.trials import NOT_TRIED, TRIALS, Trial, every_trial
from luthier.training import STRATEGIES

__all__ = ["measured", "write"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "strategies-table.md"
MEASURED = ROOT / "src" / "luthier" / "strategies" / "measured.json"
HEAD = """# Every strategy beside plain training

`python -m experiments.strategies` tries each strategy in one small scene of real rows, beside plain training with the
same seed, rows, method and steps, and beside plain training with as many passes over the model: a strategy that costs
two passes a step meets plain training with twice the steps. Settings are the defaults but for those named.
`luthier strategies NAME` says what each is.

It says what a strategy did here, on small models and small sets, and no more. Differences are paired by seed.

"""


def write(results: Path) -> None:
    tried = dict(every_trial())
    rows = [row for row in known(results) if row["strategy"] is None or row["strategy"] in tried]
    lines: list[str] = []
    for scene, at in SCENES.items():
        here = [row for row in rows if row["scene"] == scene]
        trials = [(name, trial) for name, trial in every_trial() if trial.scene == scene]
        if trials:
            lines += [f"## {at.says}", "", *_table(here, trials, old=at.start is not None), ""]
    PAGE.write_text(HEAD + "\n".join([*lines, *_tail(rows)]).rstrip() + "\n", "utf-8")
    MEASURED.write_text(json.dumps(measured(rows), indent=1, sort_keys=True) + "\n", "utf-8")


def measured(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What came out, in words: for each strategy a sentence of each scene that it was tried in."""
    said: dict[str, list[str]] = {}
    for name, trial in every_trial():
        here = [row for row in rows if row["scene"] == trial.scene]
        found = _by_seed(here, name, trial.passes)
        plain, equal = _by_seed(here, None, 1), _by_seed(here, None, trial.passes)
        if not found or not plain:
            continue
        seeds = f"{len(found)} seed{'s' if len(found) > 1 else ''}"
        mean, beside = (statistics.fmean(r["accuracy"] for r in side.values()) for side in (found, plain))
        words = f"{SCENES[trial.scene].says}, {_given(name, trial)}{seeds}: "
        words += f"accuracy {mean:.3f}, plain training {beside:.3f}"
        if trial.passes > 1 and equal:
            words += f", with as many passes {statistics.fmean(r['accuracy'] for r in equal.values()):.3f}"
        if SCENES[trial.scene].start:
            first, theirs = (statistics.fmean(r["old"] for r in side.values()) for side in (found, plain))
            words += f"; of the first task {first:.3f} is left, plainly {theirs:.3f}"
        verdict = _verdict(found, equal or plain, trial.passes > 1)
        second = "On the second task: " if SCENES[trial.scene].start else ""
        for one in name.split("+"):
            said.setdefault(one, []).append(f"{words}. {second}{verdict}")
    return said


def _verdict(found: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]], equal: bool) -> str:
    gaps = [found[seed]["accuracy"] - other[seed]["accuracy"] for seed in found if seed in other]
    beside = "training with as many passes" if equal else "plain training"
    if len(gaps) < 2:
        return "One seed says little."
    if min(gaps) <= 0 <= max(gaps):
        return f"Not told apart from {beside}."
    side = "Higher" if min(gaps) > 0 else "Lower"
    chance = 2 * 0.5 ** len(gaps)
    return f"{side} than {beside} with each of {len(gaps)} seeds (by chance alone: {chance:.0%} of the time)."


def _given(name: str, trial: Trial) -> str:
    """What is asked for beside its name, and a comma."""
    longer = [f"{trial.longer} x the steps"] if trial.longer > 1 else []
    given = [g.removeprefix(f"{name}.") for g in trial.given]
    together = [name.replace("+", " with ")] if "+" in name else []
    return "".join(f"{word}, " for word in (*together, *longer, *given))


def _table(rows: Sequence[dict[str, Any]], trials: Sequence[tuple[str, Trial]], *, old: bool) -> list[str]:
    plain = {n: _by_seed(rows, None, n) for n in sorted({r["passes"] for r in rows if r["strategy"] is None})}
    lines = [
        f"| strategy | given | seeds | accuracy | macro F1 |{' first task |' if old else ''} passes | against plain "
        "| against equal passes |",
        "| --- | --- | --: | --: | --: |" + (" --: |" if old else "") + " --: | --: | --: |",
    ]
    for times, found in plain.items():
        lines.append(_line(f"plain, {times} x the steps" if times > 1 else "plain", "-", found, times, old, "-", "-"))
    for name, trial in trials:
        found = _by_seed(rows, name, trial.passes)
        given = _given("" if "+" in name else name, trial).removesuffix(", ") or "-"
        lines.append(
            _line(f"`{name}`", given, found, trial.passes, old,
                  _gap(found, plain.get(1, {})), _gap(found, plain.get(trial.passes, {})))
        )  # fmt: skip
    return lines


def _line(
    shown: str, given: str, found: dict[int, dict[str, Any]], passes: int, old: bool, plain: str, equal: str
) -> str:
    if not found:
        return f"| {shown} | {given} | - | - | - |{' - |' if old else ''} {passes} | - | - |"
    f1 = statistics.fmean(r["scores"].get("macro_f1", float("nan")) for r in found.values())
    first = f" {statistics.fmean(r['old'] for r in found.values()):.3f} |" if old else ""
    mean = statistics.fmean(r["accuracy"] for r in found.values())
    return f"| {shown} | {given} | {len(found)} | {mean:.3f} | {f1:.3f} |{first} {passes} | {plain} | {equal} |"


def _by_seed(rows: Sequence[dict[str, Any]], name: str | None, passes: int) -> dict[int, dict[str, Any]]:
    return {r["seed"]: r for r in rows if r["strategy"] == name and r["passes"] == passes and "accuracy" in r}


def _gap(found: dict[int, dict[str, Any]], other: dict[int, dict[str, Any]]) -> str:
    """The mean difference over the seeds that both have, and between which values it lies."""
    gaps = [found[seed]["accuracy"] - other[seed]["accuracy"] for seed in found if seed in other]
    if not gaps:
        return "-"
    spread = f" ({min(gaps):+.3f} to {max(gaps):+.3f})" if len(gaps) > 1 else ""
    return f"{statistics.fmean(gaps):+.3f}{spread}"


def _tail(rows: Sequence[dict[str, Any]]) -> list[str]:
    every = {c.name for c in STRATEGIES.cards()}
    rest = sorted(every - set(TRIALS) - set(NOT_TRIED))
    refused = [f"- {r['strategy'] or 'plain'} ({r['scene']}): {r['refused']}" for r in rows if "refused" in r]
    return [
        "## What to read from it", "",
        "Accuracy and macro F1: means over seeds on 300 held-out rows; a score of 0.8 is uncertain by 0.045 from the",
        "rows alone. The last two columns: mean difference in accuracy by seed, and the least and the largest of them.",
        "With three seeds no difference whose range holds zero means anything, and few of the others do: six seeds",
        "are the least from which `luthier compare` claims one.", "",
        *refused,
        *(f"- {name} has no row: {why}." for name, why in sorted(NOT_TRIED.items()) if name in every),
        *([f"- Not tried yet: {', '.join(rest)}."] if rest else []), "",
    ]  # fmt: skip

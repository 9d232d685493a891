"""`docs/defaults.md`, from the results."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from experiments.defaults.panel import PANEL, WORDS
from experiments.results import known

__all__ = ["write"]

PAGE = Path(__file__).parents[2] / "docs" / "defaults.md"
HEAD = f"""# What the defaults reach

`python -m experiments.defaults` tries the defaults on sets that packages ship (`experiments/defaults/panel.py`: rows
drawn by a keyed order, texts cut to their first {WORDS} words so that one core does it) and writes this page.
All columns answer the same held-out rows.

- **words**: TF-IDF of words and pairs of words, with logistic regression.
- **probe**: the mean of the frozen model's last states (minilm-l6), with logistic regression.
- **before**: LoRA with 3 epochs whatever the rows, luthier's default up to 0.2.0.
- the others: `luthier train sample:minilm-l6 --data ROWS --method NAME` with nothing else given.

The bar: LoRA's defaults are at least the best of majority, words and probe, less one standard error of that score.
Where they are below it, the run's own last lines name the baseline that wins (`tests/training/test_quality.py`).

"""


def write(results: Path) -> None:
    rows = known(results)
    methods = list(dict.fromkeys(r["what"] for r in rows if r["state"] == "now" and r["what"] != "lora"))
    names = ["words", "probe", "before", "lora", *methods]
    lines = [
        f"| set | rows | held out | majority | {' | '.join(names)} | bar | met |",
        "| --- | --: | --: | --: | " + "--: | " * (len(names) + 1) + "--- |",
    ]
    for member in PANEL:
        here = [r for r in rows if r["set"] == member.name]

        def of(what: str, state: str, here: list[dict[str, Any]] = here) -> tuple[float | None, int]:
            found = [r["accuracy"] for r in here if (r["what"], r["state"]) == (what, state)]
            return (statistics.median(found), len(found)) if found else (None, 0)

        cheap = [of("majority", ""), of("tfidf", ""), of("probe", "")]
        tuned = [of("lora", "before"), of("lora", "now"), *(of(m, "now") for m in methods)]
        best = max((v for v, _ in cheap if v is not None), default=None)
        if best is None:
            continue
        bar = best - math.sqrt(best * (1 - best) / member.test)
        ours = tuned[1][0]
        met = "-" if ours is None else "yes" if ours >= bar else "**no**"
        cells = [_shown(*v) for v in (*cheap, *tuned)]
        lines.append(f"| {member.name} | {member.train} | {member.test} | {' | '.join(cells)} | {bar:.3f} | {met} |")
    seeds = "\nAccuracy; (n) is a median over n seeds, without it one seed. A dash was not run.\n"
    tail = _tried(rows)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n" + seeds + tail, "utf-8")


def _tried(rows: list[dict[str, Any]]) -> str:
    """Other ways to stop that were tried with LoRA, and are not the default."""
    states = [s for s in dict.fromkeys(r["state"] for r in rows) if s.startswith("stop-")]
    if not states:
        return ""
    lines = [
        "\nTried with LoRA, seed 0, and not the default: stopping by a share of the training rows also below 500 rows,",
        "by accuracy or by loss (`stop-MEASURE-SHARE`; default: by accuracy, from 500 rows on). By loss, sarcasm loses",
        "what privacy-policy and boolq gain.",
        "",
        f"| set | now | {' | '.join(states)} |",
        "| --- | --: | " + "--: | " * len(states),
    ]
    for member in PANEL:
        here = {r["state"]: r["accuracy"] for r in rows if (r["set"], r["what"], r["seed"]) == (member.name, "lora", 0)}
        if any(state in here for state in states):
            cells = [f"{here[state]:.3f}" if state in here else "-" for state in ("now", *states)]
            lines.append(f"| {member.name} | {' | '.join(cells)} |")
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _shown(value: float | None, seeds: int) -> str:
    return "-" if value is None else f"{value:.3f}" + (f" ({seeds})" if seeds > 1 else "")

"""From the results: `docs/methods-table.md`, and what `luthier methods NAME` says of them.

The second is a file of the package, `luthier/methods/measured.json`: method -> a sentence for each set.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.results import known
from luthier.surgery import METHODS

__all__ = ["MEASURED", "measured", "write"]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "methods-table.md"
MEASURED = ROOT / "src" / "luthier" / "methods" / "measured.json"
STUDENT = {3: 4.303, 4: 3.182, 5: 2.776}
"""Seeds -> the 97.5 % point of Student's distribution with one degree of freedom less."""
SETS = ("trec6", "sms-spam", "movie-snippets")
FREE = {"trec6": (0.183, 0.723, 0.817)}
"""Set -> what the most frequent class, counted words and the mean of the frozen model's states reach, by `defaults`."""
HEAD = """# Every method at its defaults

`python -m experiments.methods` trains each method on minilm-l6 with 600 rows of trec6 (six classes, rows drawn by a
keyed order) and scores 300 others; `--set sms-spam` and `--set movie-snippets` do so with those. Nothing but the
method's name and the seed is given. A method that changes another's numbers stands beside the one it is described with;
one that needs sources has two, from headlines and text messages.

It says what the defaults do on small sets, not which method is best. The default rates of adamix (4e-4 before, which
gave 0.417), unilora (5e-3, 0.330), sequential_adapter (3e-4, 0.867), supertuning (1e-3, 0.323) and intrinsic_said
(1e-2, 0.183) were changed after runs with these very rows of trec6, so their scores there and that of sparse_adapter
(0.587 before) are a little too good. That of u_mam (1e-4, 0.183) was chosen on 600 other questions of trec6, where
1e-4 gave 0.23, 5e-3 0.85 and 2e-3 0.90; that of the second phase of lt_sft (the first one's 5e-5 before, 0.463) on
them too, where 5e-5 gave 0.513 and a hundred times as much 0.903; that of lorahub's head (2e-3, 0.290) is
head_only's. That of frod (1e-2, 0.887) was lowered for a decoder's sake. Rates of osf (1e-4, 0.738), threshold_mask
(1e-3, 0.502), of the second phase of diff_pruning (0.458), of adapter_fusion (1e-3, 0.550; at 5e-5 0.270) and of the
heads of prefix_tuning (5e-5, 0.417), mam (1e-4, 0.785), pissa (2e-4, 0.755), unipelt (5e-4, 0.770), olora (2e-4,
0.848), corda (2e-4, 0.837) and p_tuning (3e-3, 0.602) were chosen by `python -m experiments.rates`, which scores
other questions. The others were not touched.
`luthier compare` puts methods beside each other on your own rows.

"""

Found = dict[str, dict[str, list[dict[str, Any]]]]
"""Method -> set -> its results."""


def write(results: Path) -> None:
    found: Found = {name: {of: [] for of in SETS} for name in METHODS.ours()}
    for row in known(results):
        found.setdefault(row["method"], {of: [] for of in SETS})[row["set"]].append(row)
    sets = [of for of in SETS if any(rows[of] for rows in found.values())]
    bars = {of: _mean(found["head_only"][of]) for of in sets}
    lines = []
    for family in sorted({card.family for card in METHODS.cards() if card.name in found}):
        lines += [
            f"## {family.capitalize()}", "",
            f"| method | {' | '.join(sets)} | trained | stored | held | steps | CPU s | above head_only |",
            f"| --- |{' --- |' * len(sets)} --: | --: | --: | --: | --: | --- |",
        ]  # fmt: skip
        names = [card.name for card in METHODS.cards() if card.family == family and card.name in found]
        lines += [_line(name, found[name], bars) for name in names] + [""]
    PAGE.write_text(HEAD + "\n".join([*lines, *_tail(found, bars)]).rstrip() + "\n", "utf-8")
    MEASURED.write_text(json.dumps(measured(known(results)), indent=1, sort_keys=True) + "\n", "utf-8")


def measured(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """What came out, in words: for each method a sentence of each set that it learnt."""
    by_set: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if "accuracy" in row:
            by_set.setdefault(row["set"], {}).setdefault(row["method"], []).append(row)
    said: dict[str, list[str]] = {}
    for of, found in by_set.items():
        beside = {name: _mean(found[name]) for name in ("head_only", "lora") if name in found}
        for name, mine in found.items():
            others = [f"{other} {mean:.3f}" for other, mean in beside.items() if other != name]
            said.setdefault(name, []).append(
                f"minilm-l6 on 600 rows of {of}, at the defaults: accuracy {_spread(mine)}; {', '.join(others)}."
            )
    return said


def _spread(rows: Sequence[dict[str, Any]]) -> str:
    """The mean, and the least and the most of several seeds."""
    scores = [row["accuracy"] for row in rows]
    if len(scores) == 1:
        return f"{scores[0]:.3f} (one seed)"
    return f"{statistics.fmean(scores):.3f} ({len(scores)} seeds: {min(scores):.3f} to {max(scores):.3f})"


def _line(name: str, rows: dict[str, list[dict[str, Any]]], bars: dict[str, float | None]) -> str:
    done = [row for of in bars for row in rows[of] if "accuracy" in row]
    scores = " | ".join(_score(rows[of]) for of in bars)
    link = f"[{name}](methods/{name}.md)"
    if not done:
        return f"| {link} | {scores} | - | - | - | - | - | - |"
    main = next(there for of in bars if (there := [row for row in rows[of] if "accuracy" in row]))
    below = [of for of in bars if (bar := bars[of]) is not None and (m := _mean(rows[of])) is not None and m <= bar]
    beats = "-" if name == "head_only" else f"**not on {', '.join(below)}**" if below else "yes"
    steps = round(statistics.median(row["steps"] for row in main))
    stored, held, cpu = (_median(main, what) for what in ("stored", "held", "cpu_seconds"))
    sizes = f"{_bytes(stored)} | {_bytes(held)}"
    seconds = "-" if cpu is None else f"{cpu:.0f}"
    return f"| {link} | {scores} | {main[0]['trained']:,} | {sizes} | {steps} | {seconds} | {beats} |"


def _score(rows: Sequence[dict[str, Any]]) -> str:
    """The mean, and its interval over three seeds or more: of two it is wider than what accuracy can be."""
    scores = [row["accuracy"] for row in rows if "accuracy" in row]
    if not scores:
        return "refused" if rows else "-"
    seeds = f"{len(scores)} seed{'s' if len(scores) > 1 else ''}"
    return f"{statistics.fmean(scores):.3f} ({_interval(scores) if len(scores) > 2 else seeds})"


def _median(rows: Sequence[dict[str, Any]], what: str) -> float | None:
    values = [row[what] for row in rows if what in row]
    return statistics.median(values) if values else None


def _bytes(size: float | None) -> str:
    return "-" if size is None else f"{size / 2**20:.3g} MiB"


def _tail(found: Found, bars: dict[str, float | None]) -> list[str]:
    every = {name: [row for of in SETS for row in rows[of]] for name, rows in found.items()}
    one = [n for n, rows in every.items() if any(r.get("answers") == 1 for r in rows)]
    refused = {f"- {n}: {r['refused']}": None for n, rows in every.items() for r in rows if "refused" in r}
    lines = ["## What to read from it", ""]
    for of in bars:
        means = {n: _mean(rows[of]) for n, rows in found.items()}
        bar = bars[of]
        below = [n for n, mean in means.items() if bar is not None and mean is not None and mean < bar]
        missing = sum(not rows[of] for rows in found.values())
        fewer = sum(0 < sum("accuracy" in row for row in rows[of]) < 3 for rows in found.values())
        lines += [
            f"- {of}: below head_only: {', '.join(below) or 'none'}. Not run: {missing} of {len(found)} methods; with"
            f" fewer than three seeds: {fewer}."
        ]
        if of in FREE:
            always, words, states = FREE[of]
            lines += [
                f"  Always the most frequent class: {always:.3f}. Words counted and logistic regression: {words:.3f};",
                f"  the same on the mean of the frozen model's states: {states:.3f} ([defaults](defaults.md)).",
            ]
    return [
        *lines,
        f"- One class for every row, with some seed: {', '.join(one) or 'none'}.",
        *refused, "",
        "Accuracy: mean over seeds, and Student's 95 % interval over three seeds; it says nothing of other rows: with",
        "300 of them a score of 0.8 is uncertain by 0.045 from that alone. Trained: numbers without the head. Stored:",
        "the saved file with the head. Held: weights, gradients, moments and activations at their most. CPU s: of the",
        "whole run on one thread, with loading and scoring, median. The last five are of trec6. `head_only` reads the",
        "frozen first token.", "",
    ]  # fmt: skip


def _interval(scores: Sequence[float]) -> str:
    if len(scores) not in STUDENT:
        return "-"
    half = STUDENT[len(scores)] * statistics.stdev(scores) / math.sqrt(len(scores))
    mean = statistics.fmean(scores)
    return f"{max(0.0, mean - half):.3f} to {min(1.0, mean + half):.3f}"


def _mean(rows: Sequence[dict[str, Any]]) -> float | None:
    scores = [row["accuracy"] for row in rows if "accuracy" in row]
    return statistics.fmean(scores) if scores else None

"""`docs/chat-table.md`, from the results."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from experiments.results import known
from luthier.surgery import METHODS

__all__ = ["BASE", "GIVEN", "LENGTH", "MODEL", "ROWS", "SCORED", "STEPS", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "chat-table.md"
MODEL = "smollm2-135m"
STEPS, ROWS, LENGTH, SCORED = 20, 8, 64, 100
BASE = "(none)"
GIVEN: dict[str, dict[str, Any]] = {
    "bitfit": {"add_missing_biases": True},
    "c3a": {"block": 96},
    "compacter": {"reduction": 24},
    "compacter_pp": {"reduction": 24},
    "hiwi": {"of": "weight"},
    "vblora": {"length": 96},
}
"""Settings of methods whose defaults this model refuses: what the refusal itself advises."""
HEAD = f"""# Every method at its defaults on a chat model

`python -m experiments.chat` trains each method on {MODEL} with the conversations of chitchat for {STEPS} steps of
{ROWS} rows of at most {LENGTH} tokens, and scores {SCORED} held-out rows: the perplexity of their answers. Nothing but
the method's name is given, and of {len(GIVEN)} methods a setting, which stands beside the name: their defaults do not
fit this model's width of 576, or want biases that it lacks, and the value is one that their refusal names. A method
that changes another's numbers stands beside the one it is described with; one that needs sources has runs of half as
many steps.

The default rate of frod (1e-2 before, which gave 830) was chosen by these very rows, so its score is a little too good.
It says whether the defaults learn on a decoder in so few steps, not which method is best: rates differ, and a method
that starts elsewhere than at the model has a way to go first.

"""


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page."""
    rows = known(results)
    bases = [row["perplexity"] for row in rows if row["method"] == BASE and "perplexity" in row]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS.ours()}
    for row in rows:
        if row["method"] != BASE:
            found.setdefault(row["method"], []).append(row)
    base = statistics.fmean(bases) if bases else None
    lines = [] if base is None else [f"The model as it is: {base:.2f}.", ""]
    for family in sorted({card.family for card in METHODS.cards() if card.name in found}):
        lines += [
            f"## {family.capitalize()}", "",
            "| method | perplexity | change | trained | stored | held | CPU s |",
            "| --- | --: | --: | --: | --: | --: | --: |",
        ]  # fmt: skip
        names = [card.name for card in METHODS.cards() if card.family == family and card.name in found]
        lines += [_line(name, found[name], base) for name in names] + [""]
    page.write_text(HEAD + "\n".join([*lines, *_tail(found, base)]).rstrip() + "\n", "utf-8")


def _line(name: str, rows: list[dict[str, Any]], base: float | None) -> str:
    given = ", ".join(f"{setting}={str(value).lower()}" for setting, value in GIVEN.get(name, {}).items())
    link = f"[{name}](methods/{name}.md){f' ({given})' if given else ''}"
    done = [row for row in rows if "perplexity" in row]
    if not done or base is None:
        return f"| {link} | {'refused' if rows else '-'} | - | - | - | - | - |"
    mean = statistics.fmean(row["perplexity"] for row in done)
    seeds = f" ({len(done)} seeds)" if len(done) > 1 else ""
    held, cpu = (statistics.median(row[what] for row in done) for what in ("held", "cpu_seconds"))
    return (
        f"| {link} | {mean:.2f}{seeds} | {mean / base - 1:+.1%} | {done[0]['trained']:,} | "
        f"{done[0]['stored'] / 2**20:.3g} MiB | {held / 2**20:.0f} MiB | {cpu:.0f} |"
    )


def _tail(found: dict[str, list[dict[str, Any]]], base: float | None) -> list[str]:
    refused = {f"- {name}: {row['refused']}": None for name, rows in found.items() for row in rows if "refused" in row}
    means = {name: [r["perplexity"] for r in rows if "perplexity" in r] for name, rows in found.items()}
    worse = [name for name, of in means.items() if base is not None and of and statistics.fmean(of) >= base]
    return [
        "## What to read from it", "",
        f"- Not better than the model as it is: {', '.join(worse) or 'none'}.",
        f"- Not run: {sum(not rows for rows in found.values())} of {len(found)} methods.",
        *refused, "",
        "Stored: the saved file. Held: weights, gradients, moments and activations at their most. CPU s: of the whole",
        "run on one thread, with loading and scoring.", "",
    ]  # fmt: skip

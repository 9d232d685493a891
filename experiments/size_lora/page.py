"""`docs/size-lora.md`, from the results."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.results import known

__all__ = ["MODELS", "SEEDS", "SETS", "WAYS", "write"]

PAGE = Path(__file__).parents[2] / "docs" / "size-lora.md"
MODELS = ("minilm-l3", "minilm-l6", "mpnet-base")
SETS = ("trec6", "sarcasm", "sms-spam", "newsgroups20", "reuters-r8", "movie-snippets")
WAYS: dict[str, tuple[str, tuple[str, ...]]] = {
    "probe": ("head_only", ("run.steps=200",)),
    "lora r=4": ("lora", ("run.steps=200", "rank=4")),
    "lora r=16": ("lora", ("run.steps=200", "rank=16")),
    "lora r=64": ("lora", ("run.steps=200", "rank=64")),
    "full": ("full", ("run.steps=200",)),
}
"""Each way's method and what is given of it; all else is a default."""
SEEDS = {"minilm-l3": 3, "minilm-l6": 3, "mpnet-base": 1}
"""Of each model: one of the largest, whose runs cost nine times as much."""
HEAD = """# The size of the model and the size of the tuning

<!-- not run: it is in the source tree, and takes hours -->
```sh
python -m experiments.size_lora --minutes 20
```

trains {models} on 400 to 600 rows of six sets (trec6, sarcasm, sms-spam,
newsgroups20, reuters-r8, movie-snippets; 48 words of a text at most) in five ways: the head alone (probe), LoRA of rank
4, 16 and 64 on the queries and values, and the whole model (full), 200 steps of 16 rows, with three seeds, mpnet-base
with one. Nothing but method, rank, steps and seed is given: each way has its own default rate. 300 other rows of each
set are scored. The command goes on where it was stopped, and writes this page from what is there.

"""


def write(results: Path, page: Path = PAGE) -> None:
    """Write the page."""
    rows = known(results)
    done = [row for row in rows if "accuracy" in row]
    lines = [*_progress(rows, done)]
    if done:
        lines += ["## Mean over the sets", "", *_table([*SETS], done), ""]
        for name in SETS:
            lines += [f"## {name}", "", *_table([name], done), ""]
        lines += [
            "A cell is the mean accuracy over the seeds that are there, their number in brackets where it is not "
            f"{max(SEEDS.values())};",
            "over the sets it is given where every set has a run. One seed tells nothing of the spread.",
        ]  # fmt: skip
    page.write_text(HEAD.format(models=", ".join(MODELS)) + "\n".join(lines).rstrip() + "\n", "utf-8")


def _progress(rows: list[dict[str, Any]], done: list[dict[str, Any]]) -> list[str]:
    total = len(SETS) * len(WAYS) * sum(SEEDS.values())
    left = _hours_left(done)
    said = f"{len(done)} of {total} runs are finished"
    if left is not None and len(done) < total:
        said += f"; at the pace of these, busy as their machine was, the rest takes about {left:.1f} hours"
    refused = [
        f"- {r['model']}, {r['set']}, {r['way']}, seed {r['seed']}: {r['refused']}" for r in rows if "refused" in r
    ]
    return [f"{said}.", "", *refused, *([""] if refused else [])]


def _hours_left(done: list[dict[str, Any]]) -> float | None:
    """By the median seconds of such a model and way; of a pair that has none, by the dearest that is known."""
    own = {
        (m, w): [float(r["seconds"]) for r in done if (r["model"], r["way"]) == (m, w)] for m in MODELS for w in WAYS
    }
    known_ones = [statistics.median(seconds) for seconds in own.values() if seconds]
    if not known_ones:
        return None
    dearest = max(known_ones)
    each = (
        (statistics.median(seconds) if seconds else dearest) * (len(SETS) * SEEDS[model] - len(seconds))
        for (model, _), seconds in own.items()
    )
    return sum(each) / 3600


def _table(sets: Iterable[str], done: list[dict[str, Any]]) -> list[str]:
    lines = [f"| model | {' | '.join(WAYS)} |", f"| --- |{' --: |' * len(WAYS)}"]
    lines += [f"| {model} | {' | '.join(_cell(model, way, list(sets), done) for way in WAYS)} |" for model in MODELS]
    return lines


def _cell(model: str, way: str, sets: list[str], done: list[dict[str, Any]]) -> str:
    each = [
        [row["accuracy"] for row in done if (row["model"], row["way"], row["set"]) == (model, way, name)]
        for name in sets
    ]
    if not all(each):
        return "-"
    fewest = min(len(own) for own in each)
    mean = statistics.fmean(statistics.fmean(own) for own in each)
    return f"{mean:.3f}" if fewest >= max(SEEDS.values()) else f"{mean:.3f} ({fewest})"

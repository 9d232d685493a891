"""Folders as a comparison leaves them, without a run: sizes and contents as a test wants them."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luthier.comparison import Costs
from luthier.comparison.verdict import judge
from luthier.core import plain
from luthier.runs import Record
from luthier.runs.spec import DataSpec, RunSpec

__all__ = ["plant_comparison", "plant_run"]

ENVIRONMENT = {"luthier": "1", "python": "3.11", "torch": "2", "device": "cpu", "cpu": "a processor", "threads": 2}
WORDS = [
    "what",
    "who",
    "when",
    "how",
    "far",
    "tall",
    "is",
    "the",
    "moon",
    "of",
    "a",
    "city",
    "in",
    "which",
    "year",
    "why",
]


def plant_run(
    path: Path, *, method: str, seed: int, texts: Sequence[str], wanted: Sequence[str], said: Sequence[str],
    steps: int = 200, changed: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """One finished run folder."""
    draw = random.Random(f"{method} {seed}")
    labels = sorted(set(wanted))
    path.mkdir(parents=True)
    spec = RunSpec(
        model="sample:minilm-l6", data=DataSpec(source="sample:trec6"), method=method, seed=seed, steps=steps
    )
    values = {**plain(spec), **(changed or {})}
    _json(path / "run.json", {"format": "luthier-run", "version": 1, "spec": values, "fingerprints": {}})
    right = sum(a == b for a, b in zip(wanted, said, strict=True)) / len(wanted)
    parts = {"weights": 45_439_244, "trained": 304_152, "gradients": 304_152, "optimiser": 608_304}
    record = Record(
        spec=values, environment=ENVIRONMENT, scores={"accuracy": right, "loss": 0.7 + draw.random()}, seconds=9.5,
        peak_bytes=854_016_000 + seed, memory={**parts, "activations": 31_375_908, "program": 370_405_376, "other": 9},
        forecast={**parts, "packed": 0, "rows": 16, "tokens": 41}, trained=73_728, stored=309_310,
    )  # fmt: skip
    _json(path / "record.json", record.to_json())
    confusion = [[sum(w == a and s == b for w, s in zip(wanted, said, strict=True)) for b in labels] for a in labels]
    classes = [
        {"name": n, "rows": list(wanted).count(n), "answered": list(said).count(n), "learnt": 700, "precision": 0.5,
         "recall": 0.25, "f1": 0.4321} for n in labels
    ]  # fmt: skip
    quality = {
        "rows": len(wanted), "metric": "accuracy", "score": right, "low": right - 0.02, "high": right + 0.02,
        "baseline": 0.2, "baseline_answer": labels[0], "by_words": 0.8, "classes": classes, "confusion": confusion,
        "calibration_error": 0.04, "sure_but_wrong": [], "warnings": [],
    }  # fmt: skip
    _json(path / "quality.json", quality)
    with (path / "predictions.csv").open("w", newline="", encoding="utf-8", errors="surrogatepass") as file:
        sheet = csv.writer(file)
        sheet.writerow(["place", "text", "wanted", "answer", "sure"])
        for i, (text, a, b) in enumerate(zip(texts, wanted, said, strict=True), start=1):
            sheet.writerow([f"rows.csv:{i}", text, a, b, f"{draw.uniform(0.2, 1):.4f}"])
    lines = [{"event": "created", "at": "2026-01-01T00:00:00Z"}]
    lines += [
        {"event": "step", "step": i, "loss": round(2 / (1 + i / 30) + draw.random(), 6)} for i in range(1, steps + 1)
    ]
    lines += [
        {"event": "scores", "step": steps // 2, "accuracy": right / 2},
        {"event": "scores", "step": steps, "accuracy": right},
    ]
    (path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def plant_comparison(
    home: Path, methods: Sequence[str], seeds: int = 2, rows: int = 300, *,
    labels: Sequence[str] = ("LOC", "HUM", "NUM"),
    text: Callable[[int], str] | None = None, failed: dict[str, str] | None = None,
) -> Path:  # fmt: skip
    """A finished comparison of made-up answers, each method right in about its own share of the rows."""
    draw = random.Random(7)
    say = text or (lambda i: " ".join(draw.choices(WORDS, k=draw.randint(5, 40))))
    texts = [say(i) for i in range(rows)]
    wanted = [labels[draw.randrange(len(labels))] for _ in range(rows)]
    answers: dict[str, list[list[str]]] = {}
    runs: dict[str, tuple[str, ...]] = {}
    for m, method in enumerate(methods):
        for seed in range(seeds):
            share = 0.9 - 0.04 * m
            said = [w if draw.random() < share else labels[draw.randrange(len(labels))] for w in wanted]
            answers.setdefault(method, []).append(said)
            name = f"cells/{method.replace(':', '_').replace('/', '_')}-seed{seed}-{m:05d}{seed:05d}"
            plant_run(home / name, method=method, seed=seed, texts=texts, wanted=wanted, said=said)
            runs[method] = (*runs.get(method, ()), name)
    number = {label: i for i, label in enumerate(labels)}
    said = np.array([[[number[s] for s in one] for one in answers[m]] for m in methods])
    costs = [
        Costs(trained=10**i, seconds=9 + i, peak_bytes=8 * 10**8 + i, stored_bytes=10**i) for i in range(len(methods))
    ]
    found = judge(
        list(methods), said, np.array([number[w] for w in wanted]), np.arange(rows), seeds=range(seeds),
        metric="accuracy", margin=None, costs=costs,
        calibration=[{"calibration_error": 0.05}] * len(methods),
        baselines={"always answering 'LOC'": np.zeros(rows, dtype=np.int64)},
        failed=failed or {},
    )  # fmt: skip
    _json(home / "comparison.json", {**plain(found), "runs": runs})
    return home


def _json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")

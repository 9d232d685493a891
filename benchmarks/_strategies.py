"""A strategy as a contestant: the same steps with it and plainly; and what its page says that they cost."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import _ours
from benchmarks._suite import Case, Contestant
from benchmarks._work import rows, write_rows

__all__ = ["ASKED", "cases", "encoder"]

ASKED: dict[str, tuple[str, float]] = {
    "freelb": ("step_seconds", 2.1),
    "kd_logits": ("step_seconds", 1.05),
    "l2_sp": ("step_seconds", 1.05),
    "ewc": ("step_seconds", 1.05),
    "lisa": ("peak_bytes", 1.0),
    "mezo": ("peak_bytes", 1.0),
}
"""Strategy -> what is measured, and the most it may be of the plain run's; a teacher has answered before step 1."""

ON = {
    "lora": ("freelb", "kd_logits", "r_drop", "scl", "self_ensemble", "smart"),
    "full": ("l2_sp", "ewc", "lisa", "llrd", "mixout", "recadam", "lomo", "mezo"),
}
"""Method -> the strategies that are tried with it."""

RATES = {"lomo": 0.01, "mezo": 1e-6}


def cases(quick: bool) -> list[Case]:
    """Each strategy beside the plain step of the same method."""
    steps = 3 if quick else 24
    return [
        Case(
            f"strategies-{method}",
            f"minilm-l6 + {method} on trec6, batch 32, {steps} steps, plainly and with each strategy",
            tuple(
                Contestant(name or "plain", "_strategies", "encoder", {"strategy": name, "method": method, "steps": n})
                for name, n in [("", steps), *((name, steps) for name in names)]
            ),
            repeats=1 if quick else 3,
            unit="step_seconds",
            higher_is_better=False,
        )
        for method, names in ON.items()
    ]


def encoder(strategy: str, method: str, steps: int) -> dict[str, Any]:
    """`_ours.encoder` with a strategy, and what that one asks for: a teacher, or old rows."""
    with tempfile.TemporaryDirectory() as folder:
        extra: dict[str, Any] = {"strategy": strategy} if strategy else {}
        settings: dict[str, Any] = {}
        if strategy == "ewc":
            old = write_rows(Path(folder) / "old.jsonl", rows("trec6", "test")[:64])
            extra["also"] = [f"old={old}"]
            settings["answers"] = "labels"
        if strategy == "kd_logits":
            settings["teacher"] = str(_teacher())
        lr = RATES.get(strategy, 5e-5 if method == "full" else None)
        return _ours.encoder(method=method, steps=steps, lr=lr, settings=settings, extra=extra, most=32 * steps)


def _teacher() -> Path:
    """A run with the same labels; made once and kept, in a process of its own: its peak is not the student's."""
    import subprocess
    import sys

    from luthier.samples.store import cache_dir

    kept = cache_dir() / "benchmarks" / "teacher"
    if not kept.is_dir():
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as folder:
            out = str(Path(folder) / "run")
            words = ["train", "sample:minilm-l6", "--data", "sample:trec6", "--steps", "20", "--out", out]
            subprocess.run([sys.executable, "-m", "luthier", *words], check=True, capture_output=True)
            Path(out).rename(kept)
    return kept

"""Which of several runs on the same rows differ, and which do not: by the rows that one has right and another wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core import listed

__all__ = ["Comparison", "compare"]

CHANCE = 0.05
"""Of calling any run worse that is not, over all comparisons with the best."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Plain facts about runs that were scored on the same rows."""

    rows: int
    best: tuple[str, ...]
    """methods that cannot be told apart from the one with the highest accuracy, it among them"""
    worse: tuple[str, ...]
    kept: str
    """of the best, the one that trains the fewest numbers"""
    rare_class: str = ""
    rare_rows: int = 0
    rare_best: tuple[str, ...] = ()
    """methods with the highest F1 of the rarest class"""
    rare_f1: float = 0.0

    def sentences(self) -> list[str]:
        """What a reader should take from it."""
        if len(self.best) == 1:
            found = [f"On these {self.rows} held-out rows {self.best[0]} is better than the others."]
        else:
            found = [f"These {self.rows} held-out rows do not tell {listed(self.best)} apart."]
            if self.worse:
                found[0] += f" {listed(self.worse)} {'is' if len(self.worse) == 1 else 'are'} worse."
        if self.rare_best:
            found.append(
                f"On the rarest class, {self.rare_class!r} ({self.rare_rows} rows), best: {listed(self.rare_best)} "
                f"(F1 {self.rare_f1:.2f})."
            )
        if len(self.best) > 1:
            found.append(f"Of those that are not told apart, {self.kept} trains the fewest numbers.")
        return found


def compare(runs: Sequence[dict[str, Any]]) -> Comparison:
    """Compare by McNemar's exact test with the run of the highest accuracy.

    Args:
        runs: facts of finished runs with the same held-out rows: method, path, scores, trained, quality.
    """
    from luthier.comparison import answers_of, flips, holm, mcnemar

    right = {
        run["method"]: [a == w for a, w in zip(got.said, got.wanted, strict=True)]
        for run in runs
        for got in (answers_of(run["path"]),)
    }
    top = max(runs, key=lambda run: (run["scores"]["accuracy"], -run["trained"]))["method"]
    others = [run["method"] for run in runs if run["method"] != top]
    chances = holm([mcnemar(*flips(right[top], right[name])) for name in others])
    worse = tuple(name for name, chance in zip(others, chances, strict=True) if chance < CHANCE)
    best = tuple(run["method"] for run in runs if run["method"] not in worse)
    kept = min((run for run in runs if run["method"] in best), key=lambda run: run["trained"])["method"]
    return Comparison(rows=len(right[top]), best=best, worse=worse, kept=kept, **_rare(runs))


def _rare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    classes = [{c["name"]: c for c in (run["quality"] or {}).get("classes", ())} for run in runs]
    scored = [c for c in classes[0].values() if c["rows"]]
    if len(scored) < 2:
        return {}
    rarest = min(scored, key=lambda c: (c["learnt"], c["rows"]))
    f1 = {run["method"]: found[rarest["name"]]["f1"] for run, found in zip(runs, classes, strict=True)}
    most = max(f1.values())
    best = tuple(name for name, value in f1.items() if value == most) if most > 0 else ()
    return {"rare_class": rarest["name"], "rare_rows": rarest["rows"], "rare_best": best, "rare_f1": most}

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
    """Compare with the run of the highest accuracy, as `luthier compare` does, by resamples of these rows.

    There is one run of each: what is found is of these trained models, and another seed makes others. The exact test
    of McNemar has to agree: where few rows differ, resamples find too much.

    Args:
        runs: facts of finished runs with the same held-out rows: method, path, scores, trained, quality.
    """
    import numpy as np

    from luthier.comparison import answers_of, clusters, flips, mcnemar, resample
    from luthier.comparison.scores import accuracy

    answers = [answers_of(run["path"]) for run in runs]
    numbers = {
        label: i for i, label in enumerate(dict.fromkeys(w for got in answers for w in (*got.wanted, *got.said)))
    }
    wanted = np.array([numbers[label] for label in answers[0].wanted])
    answered = np.array([[[numbers[label] for label in got.said]] for got in answers])  # (runs, one seed, rows)
    top = max(range(len(runs)), key=lambda i: (runs[i]["scores"]["accuracy"], -runs[i]["trained"]))
    chances = resample(accuracy, wanted, answered, clusters(answers[0].texts)).beside_the_best(top)
    right = answered[:, 0] == wanted
    exact = [mcnemar(*flips(right[top], own)) for own in right]
    worse = tuple(run["method"] for run, *p in zip(runs, chances, exact, strict=True) if max(p) < CHANCE)
    best = tuple(run["method"] for run in runs if run["method"] not in worse)
    kept = min((run for run in runs if run["method"] in best), key=lambda run: run["trained"])["method"]
    return Comparison(rows=len(wanted), best=best, worse=worse, kept=kept, **_rare(runs))


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

"""The end of a cross-validation on the screen: folds, mean with its interval, classes, what is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luthier.cli._next import predict_command
from luthier.cli._output import Screen, screen
from luthier.cli._progress import Watcher

if TYPE_CHECKING:
    from luthier.runs.spec import RunSpec

__all__ = ["train_folds"]

MOST_CLASSES = 20


def train_folds(spec: RunSpec | str, folds: int | None) -> None:
    """Run it, or go on with the one in a folder, and show what came out."""
    from luthier.workflow.cross_validation import cross_validate

    seen: list[str] = []

    def listener_of(name: str) -> Watcher:
        seen.append(name)
        screen().say(f"\n{name}" if len(seen) > 1 else name)
        return Watcher(title=name, brief=len(seen) > 1)

    found = cross_validate(spec, folds, listener_of=listener_of)
    to = screen()
    intervals = {name: [low, high] for name, (low, high) in found.intervals.items()}
    to.result(
        {
            "path": str(found.path), "folds": list(found.folds), "mean": found.mean, "intervals": intervals,
            "classes": list(found.classes), "final": str(found.final),
        }
    )  # fmt: skip
    _show(to, found)


def _show(to: Screen, found: Any) -> None:
    names = list(found.mean)
    rows = [(f"{i}", *(f"{each[n]:.4g}" for n in names)) for i, each in enumerate(found.folds, start=1)]
    to.show()
    to.table(("fold", *names), rows, right=("fold", *names))
    first = names[0]
    low, high = found.intervals[first]
    to.headline(
        f"\n{first} {found.mean[first]:.3f} on average over {len(found.folds)} folds (95 % interval of the mean "
        f"{low:.3f} to {high:.3f})"
    )
    to.show(" · ".join(f"{name} {found.mean[name]:.4g}" for name in names[1:]))
    if found.classes:
        to.show("\nclass by class, over all folds:")
        shown = found.classes[:MOST_CLASSES]
        to.table(
            ("class", "rows", "found", "precision"),
            [(c["name"], c["rows"], f"{c['found']:.2f}", f"{c['precision']:.2f}") for c in shown],
            right=("rows", "found", "precision"),
        )
        if len(found.classes) > MOST_CLASSES:
            to.show(f"and {len(found.classes) - MOST_CLASSES} smaller classes: quality.json of each fold")
    to.show(
        f"\nThe run on all rows is {found.final}; no row is left to score it on: expect of it the mean above."
        f"\nNext: {predict_command(found.final)}"
        f"\nReport: luthier report {found.path}"
    )  # fmt: skip

"""A recipe on the screen: its phases as they run, their scores, and which run is the result."""

from __future__ import annotations

from typing import TYPE_CHECKING

from luthier.cli._next import kept_rows, predict_command
from luthier.cli._output import screen
from luthier.cli._progress import Watcher

if TYPE_CHECKING:
    from luthier.runs.spec import RunSpec

__all__ = ["follow_recipe"]


def follow_recipe(spec: RunSpec | str) -> None:
    """Run it, or go on with the one in a folder, and show what came out."""
    from luthier.workflow.recipes import follow

    found = follow(spec, listener=Watcher(title="recipe"))
    to = screen()
    to.result({"path": str(found.path), "phases": found.phases, "result": str(found.result)})
    said = [
        (name, " · ".join(f"{score} {value:.4g}" for score, value in scores.items()) or "not scored")
        for name, scores in found.phases.items()
    ]
    to.show()
    to.table(("phase", "scores on its held-out rows"), said)
    to.show(f"\nThe run of the last phase is the result: {found.result}")
    to.show(f"Next: {predict_command(found.result)}")
    if kept := kept_rows(found.result):
        to.show(kept)
    to.show(f"Report: luthier report {found.path}")

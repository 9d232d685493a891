"""Who follows a run: the command line's progress, a notebook, a tracker."""

from __future__ import annotations

from typing import Any

__all__ = ["Listener"]


class Listener:
    """Is told what happens in a run; the command line draws it. Every method may be left as it is."""

    def say(self, line: str) -> None:
        """One line of facts."""

    def start(self, total: int, done: int) -> None:
        """Training begins at step `done` of `total`."""

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        """An optimiser step has been made."""

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Held-out rows have been scored."""

    def end(self) -> None:
        """Training has ended."""

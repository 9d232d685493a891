"""Trackio: the project "luthier" of this machine, for `trackio show`."""

from __future__ import annotations

from typing import Any

__all__ = ["PACKAGE", "Sink"]

PACKAGE = "trackio"


class Sink:
    def __init__(self, run: str, facts: dict[str, Any]) -> None:
        import trackio

        self._trackio: Any = trackio
        trackio.init(project="luthier", name=run, config=facts)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._trackio.log(numbers, step=step)

    def close(self, end: str) -> None:
        self._trackio.finish()

"""When the state of a run is made safe: so many steps apart, or so many seconds."""

from __future__ import annotations

import time

from luthier.runs.spec import CheckpointSpec

__all__ = ["SaveTimes"]


class SaveTimes:
    """Says when a checkpoint is due. Seconds count from the last save, or from when this was made."""

    def __init__(self, spec: CheckpointSpec) -> None:
        self._spec = spec
        self._saved = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved."""
        steps, seconds = self._spec.every_steps, self._spec.every_seconds
        if steps is not None and step % steps == 0:
            return True
        return seconds > 0 and time.monotonic() - self._saved > seconds

    def saved(self) -> None:
        """A checkpoint has been written."""
        self._saved = time.monotonic()

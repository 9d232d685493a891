"""The trial before step 1, or step 1 itself where it is as wide as any: what its forward pass keeps is counted."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

from luthier.data.batches import Batch
from luthier.surgery import Tuned
from luthier.training.memory_parts import Parts
from luthier.training.optimiser import Optimiser

__all__ = ["Trial", "as_wide"]


class Trial:
    """Counts bytes by part while it is on.

    Attributes:
        memory: bytes by part, from the last pass that was counted.
    """

    def __init__(self, tuned: Tuned, optimiser: Optimiser, device: torch.device) -> None:
        self._tuned, self._optimiser, self._device = tuned, optimiser, device
        self._parts: Parts | None = None
        self.memory: dict[str, int] = {}

    def begin(self) -> None:
        """Count the next pass."""
        self._parts = Parts(self._tuned, self._optimiser, self._device)

    def begin_again(self) -> None:
        """The pass did not fit: if it was to be counted, the next one is."""
        if self._parts is not None:
            self.begin()

    def end(self) -> None:
        """Count nothing more."""
        self._parts = None

    def watching(self) -> AbstractContextManager[None]:
        """Around a forward pass: notes what it keeps, where it is to be counted."""
        return self._parts.watching() if self._parts is not None else nullcontext()

    def count(self) -> None:
        """Note what the pass held, while its gradients are there."""
        if self._parts is not None:
            self.memory, self._parts = self._parts.counted(), None


def as_wide(batch: Batch, longest: Batch) -> bool:
    """Whether a pass over `batch` needs at least the memory of one over `longest`."""
    shapes = {name: x.shape for name, x in batch.inputs.items()}
    return shapes == {name: x.shape for name, x in longest.inputs.items()} and batch.n_targets >= longest.n_targets

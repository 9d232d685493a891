"""What comes out of the trunk in a pass, and the one state of each row that a head reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core import AnatomyError
from luthier.data.batches import Batch
from luthier.surgery.view import TunedView

__all__ = ["States", "watched_states"]


class States:
    """The trunk's states of the last pass: (rows, tokens, d), with their graph."""

    def __init__(self, first: bool) -> None:
        self._first = first
        self.last: Tensor | None = None

    def pooled(self, batch: Batch) -> Tensor:
        """One state of each row: of the first token in an encoder, of the last one elsewhere. (rows, d).

        Raises:
            AnatomyError: no pass of the trunk was seen.
        """
        if self.last is None:
            raise AnatomyError("no states of the trunk were seen in the forward pass. Use another model.")
        if self._first:
            return self.last[:, 0]
        last = batch.inputs["attention_mask"].sum(-1) - 1  # (rows,): training pads on the right
        return self.last[torch.arange(len(last), device=last.device), last]


@contextmanager
def watched_states(tuned: TunedView) -> Iterator[States]:
    """Within, the states of each pass of the trunk are held. Vectors of a prompt are taken off before."""
    trunk = getattr(tuned.model, "base_model", None)
    if not isinstance(trunk, nn.Module) or trunk is tuned.model:
        raise AnatomyError(f"{type(tuned.model).__name__} has no trunk apart from its head.")
    anatomy = tuned.anatomy
    seen = States(first=not anatomy.is_decoder and not anatomy.is_encoder_decoder)

    def hook(module: nn.Module, args: Any, out: Any) -> None:
        seen.last = out[0]

    handle = trunk.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()

"""What the current forward pass knows of its batch; surgery fills it, attachments read it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Context"]


@dataclass
class Context:
    """Facts of the current forward pass of the model.

    Attributes:
        mask: (batch, tokens) of the text the (encoder or only) stack reads, 1 where real; None if all are real.
        decoder_mask: the same for the decoder of an encoder-decoder.
        past: tokens already in the key/value cache; 0 in training and at prefill.
        n_tokens: tokens given to this pass (without the past).
        generating: a step of `generate`, with or without a cache.
        memory: results that attachments keep from prefill to later steps of one generation, by any key.
    """

    mask: Tensor | None = None
    decoder_mask: Tensor | None = None
    past: int = 0
    n_tokens: int = 0
    batch: int = 0
    generating: bool = False
    memory: dict[Any, Any] = field(default_factory=dict)

    def mask_for(self, stack: str) -> Tensor | None:
        """The token mask of the stack called `stack`."""
        return self.decoder_mask if stack == "decoder" else self.mask

    def once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()` at prefill, and what it gave then at every later step of the same generation."""
        if key in self.memory and (self.past > 0 or self.generating):
            kept: Tensor = self.memory[key]
            return kept
        value = compute()
        self.memory[key] = value.detach()
        return value

"""What the current forward pass knows of its batch; surgery fills it, attachments read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.core import ModelError

__all__ = ["ROW", "Context", "facts_left_out", "may_leave_out", "packed", "read_mask"]

ROW = "row_"
"""How inputs begin that say something of each row: `row_task`."""

_LEFT_OUT = [False]


@dataclass
class Context:
    """Facts of the current forward pass of the model.

    Attributes:
        masks: by stack, (batch, tokens) of the text that it reads, 1 where real; None if all are real. "" is the text
            that the model as a whole is given.
        past: tokens already in the key/value cache; 0 in training and at prefill.
        n_tokens: tokens given to this pass (without the past).
        packed: several texts stand one behind the other in a row.
        generating: a step of `generate`, with or without a cache.
        rows: facts of the rows, whole numbers by name, such as "task": (rows,). See `row`.
        ids: (batch, tokens) of the text, the encoder's where there are two stacks; None where it came embedded.
        around: where vectors stand beside the text of this pass; None where none do. See `prompts.Around`.
        cache: the key/value cache of the block that runs, where an attachment `keeps_keys`; None without one.
        looked: what modules made of a first pass, by their id; see the edit `LookFirst`. Replaced, never written to.
        memory: results that attachments keep from prefill to later steps of one generation, by any key.
    """

    masks: dict[str, Tensor | None] = field(default_factory=dict)
    past: int = 0
    n_tokens: int = 0
    batch: int = 0
    packed: bool = False
    generating: bool = False
    rows: dict[str, Tensor] = field(default_factory=dict)
    ids: Tensor | None = None
    around: Any = None
    cache: Any = None
    looked: dict[int, Tensor] = field(default_factory=dict)
    memory: dict[Any, Any] = field(default_factory=dict)

    def row(self, name: str) -> Tensor:
        """The fact `name` of each row of the batch, (batch,); 0 where there is one value and nobody says which.

        Beams and samples of a row, which follow one another, share its fact.

        Raises:
            ModelError: facts of another number of rows.
        """
        given = self.rows.get(name)
        if given is None:
            return torch.zeros(self.batch, dtype=torch.long)
        times, rest = divmod(self.batch, max(1, len(given)))
        if rest or times == 0 or (times > 1 and not self.generating):
            raise ModelError(f"{ROW}{name}: {len(given)} numbers for a batch of {self.batch} rows. Give one a row.")
        return given if times == 1 else given.repeat_interleave(times)

    def mask_for(self, stack: str) -> Tensor | None:
        """The token mask of the stack called `stack`."""
        return self.masks.get(stack, self.masks.get("") if stack != "decoder" else None)

    def once(self, key: Any, compute: Callable[[], Tensor]) -> Tensor:
        """`compute()` at prefill, and what it gave then at every later step of the same generation.

        Raises:
            ModelError: the text comes in pieces, or several texts in one row, so nothing is known of it as a whole.
        """
        if self.packed:
            raise ModelError(
                "texts stand one behind the other in a row, and what acts here is computed from a text as a whole "
                "(UniPELT's gates). Give every text a row of its own."
            )
        if self.past > 0 and not self.generating and (key not in self.memory or self.n_tokens > 1):
            raise ModelError(
                f"{self.n_tokens} tokens after {self.past} that are in the cache: what acts here is computed from a "
                "prompt as a whole (UniPELT's gates). Give the prompt in one piece, through this model with this "
                "tuning, and then token by token with the cache that it gave."
            )
        if key in self.memory and (self.past > 0 or self.generating):
            kept: Tensor = self.memory[key]
            return kept
        value = compute()
        self.memory[key] = value.detach()
        return value


@contextmanager
def facts_left_out() -> Iterator[None]:
    """Inside, a pass may say nothing of its rows: a look at what a model does, with words that mean nothing."""
    before, _LEFT_OUT[0] = _LEFT_OUT[0], True
    try:
        yield
    finally:
        _LEFT_OUT[0] = before


def may_leave_out() -> bool:
    """Whether the pass is such a look."""
    return _LEFT_OUT[0]


def read_mask(mask: Any, past: int, n_tokens: int) -> Tensor | None:
    """(batch, tokens) of a mask as models are given it, 1 where real; None where there is none to read.

    A ready-made mask (batch, 1, queries, keys), as static caches come with, says which token sees which: a real one
    sees itself.
    """
    if isinstance(mask, dict):  # one for each kind of layer: a window hides no token from itself
        mask = next(iter(mask.values()), None)
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        return None
    if mask.dim() == 2:
        return mask
    if n_tokens < 1 or mask.shape[2] != n_tokens or mask.shape[3] < past + n_tokens:
        return None
    seen = mask[:, 0].bool() if mask.dtype == torch.bool else mask[:, 0] > torch.finfo(mask.dtype).min / 2
    return torch.diagonal(seen[:, :, past : past + n_tokens], dim1=1, dim2=2).long()


def packed(inputs: dict[str, Any]) -> bool:
    """Whether several texts stand one behind the other in a row."""
    if any(inputs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seqlens", "seq_idx")):
        return True
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return False
    falls = positions[:, 1:] < positions[:, :-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == positions.shape[1]:
        falls = falls & (mask[:, 1:] > 0) & (mask[:, :-1] > 0)  # what padding is numbered with says nothing
    return bool(falls.any())

"""The call of a block in the hands of an attachment: run it as it is, or for some tokens of each row alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core import AnatomyError

__all__ = ["BlockRun"]

_BY_TOKEN = ("position_embeddings", "position_ids")
_CARRIED = ("past_key_values", "cache_position", "encoder_hidden_states", "encoder_attention_mask")


class BlockRun:
    """One call of one block.

    Args:
        run: the block with whatever else stands at it: (args, kwargs) -> what it gives.
        block: its own module, for the names of its arguments.
    """

    def __init__(
        self, run: Callable[[tuple[Any, ...], dict[str, Any]], Any], block: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        names = list(inspect.signature(block.forward).parameters)
        self.given = dict(zip(names, args, strict=False)) | kwargs
        self._run, self._first, self._block = run, names[0], type(block).__name__

    def __call__(self, x: Tensor, pick: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """The block's result for the states `x`, (rows, tokens, d), or for some of them: (rows, k, d).

        Args:
            pick: (rows, k), numbers of the tokens that the block is run for; they see one another alone.
            kept: (rows, k), False where a row has fewer: nothing sees that token, and its result means nothing.

        Raises:
            AnatomyError: the block is given something whose tokens cannot be told, or gives more than states.
        """
        given = dict(self.given)
        if pick is not None:
            x = _gathered(x, pick)
            given = {name: self._picked(name, value, pick) for name, value in given.items()}
            given["attention_mask"] = _mask(given.get("attention_mask"), kept, x, given)
        given.pop(self._first, None)
        out = self._run((x,), given)
        if isinstance(out, tuple):
            if any(isinstance(more, Tensor) for more in out[1:]):
                raise AnatomyError(f"{self._block} gives more than states, so its call cannot be taken over.")
            out = out[0]
        assert isinstance(out, Tensor)
        return out

    def _picked(self, name: str, value: Any, pick: Tensor) -> Any:
        if name == self._first or not isinstance(value, Tensor | tuple | list) or name in _CARRIED:
            return value
        if name == "attention_mask" and isinstance(value, Tensor):
            return _picked_mask(value, pick)
        if name in _BY_TOKEN:
            whole = (value,) if isinstance(value, Tensor) else tuple(value)
            found = tuple(_gathered(part.expand(len(pick), *part.shape[1:]), pick) for part in whole)
            return found[0] if isinstance(value, Tensor) else found
        raise AnatomyError(
            f"{self._block}: it is given {name}, and which part of that belongs to which token is not known, so the "
            "block cannot be run for some tokens only. Use another method."
        )


def _gathered(x: Tensor, pick: Tensor) -> Tensor:
    """x: (rows, tokens, ...), pick: (rows, k) -> (rows, k, ...)."""
    return x[torch.arange(len(x), device=x.device)[:, None], pick]


def _picked_mask(mask: Tensor, pick: Tensor) -> Tensor:
    """Queries and keys of a mask (rows, 1 or heads, T, T), or tokens of one (rows, T)."""
    if mask.dim() == 2:
        return _gathered(mask, pick)
    rows = len(pick)
    mask = mask.expand(rows, *mask.shape[1:])
    if mask.shape[2] > 1:
        mask = mask.gather(2, pick[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, pick[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))


def _mask(mask: Any, kept: Tensor | None, x: Tensor, given: dict[str, Any]) -> Any:
    """A mask that also hides what is not kept. A query that is not kept sees the others, so that no row is empty."""
    if kept is None or bool(kept.all()):
        return mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask * kept.to(mask.dtype)
    shown = kept[:, None, None, :].expand(-1, 1, kept.shape[1], -1)  # (rows, 1, k, k)
    if mask is None:
        return shown
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)

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

    Attributes:
        given: what it was called with, by name.
        rest: what the block gave besides its states, for whoever called it.

    Args:
        run: the block with whatever else stands at it: (args, kwargs) -> what it gives.
        block: its own module, for the names of its arguments.
    """

    def __init__(
        self, run: Callable[[tuple[Any, ...], dict[str, Any]], Any], block: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        names = list(inspect.signature(block.forward).parameters)
        self.given = dict(zip(names, args, strict=False)) | kwargs
        self.rest: tuple[Any, ...] = ()
        self._run, self._first, self._block = run, names[0], block

    def __call__(self, x: Tensor, pick: Tensor | None = None, kept: Tensor | None = None) -> Tensor:
        """The block's result for the states `x`, (rows, tokens, d), or for some of them: (rows, k, d).

        Args:
            pick: (rows, k), numbers of the tokens that the block is run for; they see one another alone.
            kept: (rows, k), False where a row has fewer: nothing sees that token, and its result means nothing.

        Raises:
            AnatomyError: the block is given something whose tokens cannot be told, or gives more than states.
        """
        given = dict(self.given)
        biases = self._biases(x) if pick is not None else None
        if pick is not None:
            x = _gathered(x, pick)
            given["position_bias"] = biases
            given = {name: self._picked(name, value, pick) for name, value in given.items()}
            given["attention_mask"] = _mask(given.get("attention_mask"), kept, x, given)
        given.pop(self._first, None)
        if biases is None and "position_bias" not in self.given:
            given.pop("position_bias", None)
        out = self._run((x,), given)
        if isinstance(out, tuple | list):
            self.rest = tuple(out[1:]) if biases is None else (biases, *out[2:])
            if pick is not None and any(isinstance(t, Tensor) and t is not biases for t in self.rest):
                raise AnatomyError(f"{self._name} gives more than states, so it cannot be run for some tokens only.")
            out = out[0]
        assert isinstance(out, Tensor)
        return out

    @property
    def _name(self) -> str:
        return type(self._block).__name__

    def _biases(self, x: Tensor) -> Tensor | None:
        """Position biases of all tokens, (1, heads, T, T), where a block has them: handed on, or made by the first."""
        given: Tensor | None = self.given.get("position_bias")
        if given is None and "position_bias" in self.given:
            makers = (m for m in self._block.modules() if getattr(m, "has_relative_attention_bias", False))
            made: Tensor | None = next((m.compute_bias(x.shape[1], x.shape[1], device=x.device) for m in makers), None)  # type: ignore[operator]
            return made
        return given

    def _picked(self, name: str, value: Any, pick: Tensor) -> Any:
        if name == self._first or not isinstance(value, Tensor | tuple | list) or name in _CARRIED:
            return value
        if name in ("attention_mask", "position_bias") and isinstance(value, Tensor):
            return _picked_mask(value, pick)
        if name in _BY_TOKEN:
            whole = (value,) if isinstance(value, Tensor) else tuple(value)
            found = tuple(_gathered(part.expand(len(pick), *part.shape[1:]), pick) for part in whole)
            return found[0] if isinstance(value, Tensor) else found
        raise AnatomyError(
            f"{self._name}: it is given {name}, and which part of that belongs to which token is not known, so the "
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

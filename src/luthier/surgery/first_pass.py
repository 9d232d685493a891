"""A pass before the pass: what the model gives without a tuning decides how the tuning acts.

The hooks sit on the stack that reads the text. Its `forward` is called once more inside, past the hooks on the stack
itself, so that a pass stays one pass for everybody else.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicLayer

from luthier.core import ModelError
from luthier.surgery.context import Context

__all__ = ["FirstPass"]


class FirstPass:
    """Hooks that run `stack` without a gradient and let `module` see what it gives, before each pass.

    Args:
        whole: while it is entered, the last block computes all tokens.
    """

    def __init__(
        self, stack: nn.Module, module: nn.Module, context: Context, whole: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.enabled = True
        self.module, self.context, self._whole = module, context, whole
        self._names = list(inspect.signature(stack.forward).parameters)
        self._kept: Any = None  # the first pass's cache, until the pass itself has filled its own
        self._handles = [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.context.looked = {}
        if not self.enabled:
            return
        given = dict(zip(self._names, args, strict=False)) | kwargs
        cache = given.get("past_key_values")
        own = None if cache is None else _own(cache)
        more = {} if own is None else {"past_key_values": own}
        with torch.no_grad(), self._whole():
            out = stack.forward(**given | more)
        self._kept = getattr(out, "past_key_values", None)
        home = next((p.dtype for p in self.module.parameters()), out[0].dtype)
        self.context.looked = {id(self.module): self.module(out[0].to(home))}

    def _after(self, stack: nn.Module, args: Any, out: Any) -> None:
        kept, self._kept = self._kept, None
        cache = getattr(out, "past_key_values", None)
        if kept is None or cache is None:
            return
        for layer in kept.layers:
            layer.luthier_first = True
            cache.layers.append(layer)


def _own(cache: Any) -> Any:
    """The first pass's part of a model's cache, which is left with its other layers.

    Raises:
        ModelError: the cache has a fixed size, or was filled without a first pass.
    """
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ModelError(
            f"a first pass before each pass: a cache of {type(cache.layers[0]).__name__} layers has a fixed size and "
            "no room for its keys. Generate with the default cache, or with use_cache=False."
        )
    mine = [layer for layer in cache.layers if getattr(layer, "luthier_first", False)]
    cache.layers = [layer for layer in cache.layers if not getattr(layer, "luthier_first", False)]
    if cache.get_seq_length() == 0:
        return copy.deepcopy(cache)
    if not mine:
        raise ModelError(
            "a first pass before each pass: the cache holds keys of no first pass, so it was filled without this "
            "tuning. Give the prompt through this model with this tuning."
        )
    own = copy.copy(cache)
    own.layers = mine
    return own

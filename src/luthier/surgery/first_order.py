"""A pass to first order: the stack that reads the text gives its value and its derivative along a tuning, added up.

    f(x; at the start)  +  df/dphi (x; at the start) (phi - at the start)

Attachments of such a tuning change no value: they add to the derivative that goes along with it (`move`), which torch
carries through the stack in forward mode. Where the pass ends the two are added, in all that it gives, and what follows
(a head, a loss) reads plain tensors. A cache keeps both: the derivatives of keys and values stand in layers of their
own behind the others, so beams and crops carry them along.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import DynamicLayer

from luthier import kernels
from luthier.core import ModelError

__all__ = ["FirstOrder", "move", "value_of"]


def value_of(x: Tensor) -> Tensor:
    """The value that a derivative goes along with."""
    return _parts(x)[0]


def move(y: Tensor, moved: Tensor) -> Tensor:
    """Add `moved` to the derivative that goes along with y, and nothing to its value. Both of one shape and type.

    Raises:
        ModelError: no pass to first order is running.
    """
    if forward_ad._current_level < 0:
        raise ModelError(
            "a layer of a tuning to first order was called outside the pass of the whole stack, where derivatives go "
            "along. Call the model, without activation checkpointing."
        )
    value, before = _parts(y)
    return _dual(value, moved if before is None else before + moved)


def _parts(x: Tensor) -> tuple[Tensor, Tensor | None]:
    value, moved = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return value, moved


def _dual(value: Tensor, moved: Tensor) -> Tensor:
    both: Tensor = forward_ad.make_dual(value, moved)  # type: ignore[no-untyped-call]
    return both


class FirstOrder:
    """Hooks by which every pass of `stack` carries derivatives, and gives the sum.

    Args:
        whole: while it is entered, the last block computes all tokens.
    """

    def __init__(self, stack: nn.Module, whole: Callable[[], AbstractContextManager[None]]) -> None:
        _load_rules()
        self.enabled = True
        self._whole = whole
        self._names = list(inspect.signature(stack.forward).parameters)
        self._open: ExitStack | None = None
        self._handles = [
            stack.register_forward_pre_hook(self._before, with_kwargs=True),
            stack.register_forward_hook(self._after, always_call=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        if torch.is_grad_enabled() and stack.training and _checkpoints(stack):
            raise ModelError(
                "activation checkpointing computes blocks again when no derivatives go along any more. A tuning to "
                "first order trains without it: leave gradient_checkpointing out, or take smaller batches."
            )
        given = dict(zip(self._names, args, strict=False)) | kwargs
        with ExitStack() as opened:
            if torch.is_inference_mode_enabled():  # derivatives would be dropped there, and nothing said
                opened.enter_context(torch.inference_mode(False))
                opened.enter_context(torch.no_grad())
            opened.enter_context(kernels.plain())  # our own functions say nothing of derivatives in forward mode,
            opened.enter_context(sdpa_kernel(SDPBackend.MATH))  # nor do torch's fused ones
            opened.enter_context(self._whole())
            opened.enter_context(forward_ad.dual_level())
            _with_derivatives(given.get("past_key_values"))
            self._open = opened.pop_all()

    def _after(self, stack: nn.Module, args: Any, out: Any) -> Any:
        if self._open is None:
            return None
        with self._open:
            self._open = None
            _apart(getattr(out, "past_key_values", None))
            return _summed(out)


def _load_rules() -> None:
    """Load torch's rules of derivatives that it writes in a script of its own, by a function it warns others of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.script", category=DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _checkpoints(stack: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in stack.modules())


def _summed(out: Any) -> Any:
    """`out` with the sum in place of every value that a derivative goes along with."""
    if isinstance(out, Tensor):
        value, moved = _parts(out)
        return value if moved is None else value + moved
    if isinstance(out, tuple | list):
        return type(out)(_summed(one) for one in out)
    if isinstance(out, dict):  # what models give: its entries are its attributes
        for name, one in list(out.items()):
            out[name] = _summed(one)
    return out


def _with_derivatives(cache: Any) -> None:
    """Let the derivatives that a cache keeps go along with its keys and values again.

    Raises:
        ModelError: the cache has a fixed size, or was filled by another tuning.
    """
    if cache is None:
        return
    if not all(isinstance(layer, DynamicLayer) for layer in cache.layers):
        raise ModelError(
            f"a pass to first order: a cache of {type(cache.layers[0]).__name__} layers has a fixed size and no room "
            "for derivatives. Generate with the default cache, or with use_cache=False."
        )
    kept = [layer for layer in cache.layers if getattr(layer, "luthier_derivative", False)]
    cache.layers = [layer for layer in cache.layers if not getattr(layer, "luthier_derivative", False)]
    if cache.get_seq_length() == 0:
        return
    if len(kept) != len(cache.layers):
        raise ModelError(
            "a pass to first order: the cache keeps no derivatives, so it was filled without this tuning. Give the "
            "prompt through this model with this tuning."
        )
    for layer, moved in zip(cache.layers, kept, strict=True):
        layer.keys = _dual(layer.keys, moved.keys)
        layer.values = _dual(layer.values, moved.values)


def _apart(cache: Any) -> None:
    """Keep the derivatives of a cache's keys and values, which end with the pass, in layers of their own."""
    if cache is None or cache.get_seq_length() == 0:
        return
    for layer in list(cache.layers):
        beside = copy.copy(layer)
        beside.luthier_derivative = True
        for name in ("keys", "values"):
            value, moved = _parts(getattr(layer, name))
            setattr(layer, name, value)
            setattr(beside, name, torch.zeros_like(value) if moved is None else moved)
        cache.layers.append(beside)

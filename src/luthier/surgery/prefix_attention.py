"""Prefix keys and values through one registered attention function, for every architecture that uses the interface.

The prefix is joined to the keys inside the attention function, after the key/value cache: positions do not move, the
cache never holds it, beams need no copy of it, and the mask grows by columns that every query sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier import kernels

__all__ = ["NAME", "KeysValues", "Prefix", "add", "install", "remove", "uninstall"]

NAME = "luthier"


KeysValues = Tensor | Callable[[], Tensor] | None
"""Keys or values of a prefix, or a function that gives them; None while its tuning does not act."""

_PREFIXES = "_luthier_prefixes"
"""Where the list of an attention module's prefixes stands on it: it is the model's own module, not a class of ours."""


@dataclass(eq=False)
class Prefix:
    """What one attention module sees before its own keys; `keys`, `values` are set at the start of each forward pass.

    Shapes (n_kv_heads, P, d_head) or (batch, n_kv_heads, P, d_head); or functions that give them when the attention
    asks, for prefixes that depend on what it reads.
    """

    tuning: str
    keys: KeysValues = None
    values: KeysValues = None


def add(module: nn.Module, prefix: Prefix) -> None:
    """Let the attention `module` see `prefix`."""
    module.__dict__.setdefault(_PREFIXES, []).append(prefix)


def remove(module: nn.Module, tuning: str) -> None:
    """Take the prefixes of a tuning off, where `module` has any."""
    listed = module.__dict__.pop(_PREFIXES, ())
    left = [prefix for prefix in listed if prefix.tuning != tuning]
    if left:
        module.__dict__[_PREFIXES] = left


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it. query (B,H,T,D), key and value (B,H_kv,S,D) -> (B,T,H,D)."""
    prefixes = [p for p in module.__dict__.get(_PREFIXES, ()) if p.keys is not None]
    if prefixes:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        n_text, n_queries = key.shape[2], query.shape[2]
        if attention_mask is None and causal and n_queries > 1:
            ones = torch.ones(n_queries, n_text, dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(n_text - n_queries)[None, None]
        is_causal = False
        for prefix in prefixes:
            assert prefix.keys is not None and prefix.values is not None
            more = _per_row(prefix.keys, key)
            key = torch.cat([more, key], dim=2)
            value = torch.cat([_per_row(prefix.values, value), value], dim=2)
            length = more.shape[-2]
            if attention_mask is not None:
                seen = True if attention_mask.dtype == torch.bool else 0.0
                attention_mask = torch.nn.functional.pad(attention_mask, (length, 0), value=seen)
            if position_bias is not None:
                position_bias = torch.nn.functional.pad(position_bias, (length, 0), value=0.0)
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return kernels.attention_interface(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias=position_bias,
            **kwargs,
        )  # fmt: skip
    # The function chooses its own types; inside autocast it could only follow the plain formula. Rotated queries and
    # keys of an fp32 base come in fp32, the values in autocast's type: all go in that, as its products would.
    low = torch.get_autocast_dtype(device)
    query, key, value = query.to(low), key.to(low), value.to(low)
    with torch.autocast(device, enabled=False):
        return kernels.attention_interface(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias=position_bias,
            **kwargs,
        )  # fmt: skip


def _per_row(prefix: Tensor | Callable[[], Tensor], like: Tensor) -> Tensor:
    prefix = (prefix if isinstance(prefix, Tensor) else prefix()).to(like.dtype)
    # (rows, kv heads, P, d_head)
    return prefix if prefix.dim() == 4 else prefix.expand(like.shape[0], *prefix.shape)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, _attention)
    # The mask of torch's fused attention: boolean, and absent where plain causality says it all.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def install(model: Any) -> Any:
    """Route the model's attention through `_attention`; returns what `uninstall` needs to undo it."""
    _register()
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "to_dict")}
    before = [(c, getattr(c, "_attn_implementation_internal", None)) for c in configs.values()]
    for config, _ in before:
        config._attn_implementation_internal = NAME
    return before


def uninstall(before: Any) -> None:
    """Give every configuration its own attention back."""
    for config, name in before:
        config._attn_implementation_internal = name

"""Prefix keys and values, and attention of one's own, through one registered attention function, for every architecture
that uses the interface.

The prefix is joined to the keys inside the attention function, after the key/value cache: positions do not move, the
cache never holds it, beams need no copy of it, and the mask grows by columns that every query sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from luthier import kernels

__all__ = ["NAME", "Attending", "KeysValues", "Own", "Pairs", "Prefix", "Prefixes", "Route", "add", "add_own", "remove"]

NAME = "luthier"


KeysValues = Tensor | Callable[[], Tensor] | None
"""Keys or values of a prefix, or a function that gives them; None while its tuning does not act."""

_PREFIXES = "_luthier_prefixes"
"""Where the list of an attention module's prefixes stands on it: it is the model's own module, not a class of ours."""


Pairs = Sequence[tuple[KeysValues, KeysValues]]


class Prefixes:
    """All prefixes of one tuning.

    They are computed at the start of a pass, outside of any checkpointed block; by an attention that is called outside
    of every pass, when it asks.

    Args:
        compute: gives keys and values for each attention, or nothing while the tuning does not act.
    """

    def __init__(self, tuning: str, compute: Callable[[], Pairs]) -> None:
        self.tuning, self.compute = tuning, compute
        self.pairs: Pairs | None = None

    def pair(self, index: int) -> tuple[KeysValues, KeysValues]:
        """Keys and values of one attention."""
        pairs = self.compute() if self.pairs is None else self.pairs
        return pairs[index] if pairs else (None, None)


@dataclass(eq=False)
class Prefix:
    """What one attention module sees before its own keys.

    Shapes (n_kv_heads, P, d_head) or (batch, n_kv_heads, P, d_head); or functions that give them when the attention
    asks, for prefixes that depend on what it reads.
    """

    whole: Prefixes
    index: int

    @property
    def tuning(self) -> str:
        """Whose it is."""
        return self.whole.tuning


class Inner(Protocol):
    """What an attention does: with the text's mask, or, not `of_text`, to keys that every query sees, or that `seen`,
    (B,1,T,S) boolean, says; or else, `causal`, to those at its own place and before, for which no mask is made.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        of_text: bool = True,
        seen: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        """query (B,H,T,D), key and value (B,H_kv,S,D) -> (B,T,H,D)."""


class Attending(Protocol):
    """A module that attends in a way of its own; see the edit `Attend`."""

    def attend(self, inner: Inner, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query (B,H,T,D), key and value (B,H_kv,S,D) -> (B,T,H,D)."""


@dataclass(eq=False)
class Own:
    """What attends in one attention module, for one tuning, while that acts."""

    tuning: str
    attending: Attending
    acts: Callable[[], bool]


_OWN = "_luthier_attends"


def add_own(module: nn.Module, own: Own) -> None:
    """Let the attention `module` ask `own`."""
    module.__dict__.setdefault(_OWN, []).append(own)


def add(module: nn.Module, prefix: Prefix) -> None:
    """Let the attention `module` see `prefix`."""
    module.__dict__.setdefault(_PREFIXES, []).append(prefix)


def remove(module: nn.Module, tuning: str) -> None:
    """Take the prefixes of a tuning off, where `module` has any."""
    for place in (_PREFIXES, _OWN):
        listed = module.__dict__.pop(place, ())
        left = [one for one in listed if one.tuning != tuning]
        if left:
            module.__dict__[place] = left


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
    own = next((o for o in module.__dict__.get(_OWN, ()) if o.acts()), None)
    if own is None:
        return _with_prefixes(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
        )

    def inner(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        of_text: bool = True,
        seen: Tensor | None = None,
        causal: bool = False,
    ) -> Tensor:
        if of_text:
            return _with_prefixes(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs
            )[0]
        softcap = {"softcap": kwargs["softcap"]} if kwargs.get("softcap") else {}
        key, value = key.to(query.dtype), value.to(query.dtype)
        return _plainly(module, query, key, value, seen, 0.0, scaling, causal, None, **softcap)[0]

    return own.attending.attend(inner, query, key, value), None


def _with_prefixes(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model's attention does, with the prefixes that act."""
    pairs = [p.whole.pair(p.index) for p in module.__dict__.get(_PREFIXES, ())]
    prefixes = [(keys, values) for keys, values in pairs if keys is not None and values is not None]
    if prefixes:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        n_text, n_queries = key.shape[2], query.shape[2]
        if attention_mask is None and causal and n_queries > 1:
            ones = torch.ones(n_queries, n_text, dtype=torch.bool, device=query.device)
            attention_mask = ones.tril(n_text - n_queries)[None, None]
        is_causal = False
        for more_keys, more_values in prefixes:
            more = _per_row(more_keys, key)
            key = torch.cat([more, key], dim=2)
            value = torch.cat([_per_row(more_values, value), value], dim=2)
            length = more.shape[-2]
            if attention_mask is not None:
                seen = True if attention_mask.dtype == torch.bool else 0.0
                attention_mask = torch.nn.functional.pad(attention_mask, (length, 0), value=seen)
            if position_bias is not None:
                position_bias = torch.nn.functional.pad(position_bias, (length, 0), value=0.0)
    return _plainly(module, query, key, value, attention_mask, dropout, scaling, is_causal, position_bias, **kwargs)


def _plainly(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    is_causal: bool | None,
    position_bias: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The fused function, in the types that autocast would choose."""
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


_routed: dict[int, tuple[Any, Any, int]] = {}
"""Configurations that name our function: the object, what it named before, and how many models want ours."""


class Route:
    """A model's attention sent through `_attention`. Configurations may be shared by several models."""

    def __init__(self, model: Any) -> None:
        _register()
        found = (m.config for m in model.modules() if hasattr(m, "config") and hasattr(m.config, "to_dict"))
        self.configs = list({id(c): c for c in found}.values())
        for config in self.configs:
            _, before, count = _routed.get(id(config), (config, getattr(config, _ROUTE, None), 0))
            _routed[id(config)] = (config, before, count + 1)
            setattr(config, _ROUTE, NAME)

    def keep(self) -> None:
        """Set it again where somebody has asked for another function since: without ours there is no prefix."""
        for config in self.configs:
            if getattr(config, _ROUTE, None) != NAME:
                found, _, count = _routed[id(config)]
                _routed[id(config)] = (found, getattr(config, _ROUTE, None), count)
                setattr(config, _ROUTE, NAME)

    def close(self) -> None:
        """Give every configuration its own attention back, once no other model wants ours."""
        for config in self.configs:
            found, before, count = _routed.pop(id(config))
            if count > 1:
                _routed[id(config)] = (found, before, count - 1)
            elif getattr(config, _ROUTE, None) == NAME:
                setattr(config, _ROUTE, before)


_ROUTE = "_attn_implementation_internal"

"""Attention by whichever way was measured to be fastest here: products in cache-sized blocks, or the framework's.

    out = softmax(scaling · q kᵀ  [soft-capped]  + mask) v          per head; fewer key heads are shared by groups

A query that may look at nothing gives 0. The products are in `attention_products`.

`attention_interface` has the signature that the framework asks of an attention function. Register it together with the
framework's `sdpa_mask` as its mask function: it wants a boolean (B, 1, T, S) mask or None under the same rules.
"""

import json
import math
import weakref
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.core import ConfigError
from luthier.core.fast_paths import fast
from luthier.kernels.attention_products import Products, Settings
from luthier.kernels.dropout import dropout as keyed_dropout

__all__ = ["attend", "attention_interface", "way"]

# B batch · H query heads · K key heads · G = H / K queries per key head · T queries · S keys · D width

# Scores of a pass without gradients up to which the framework's one call beats our several, on a CPU in bf16, with
# queries counted in its blocks of 32: 48 against 113 us at 12,288 of them, 69 against 104 at 36,864, level at 49,152.
FEW_SCORES = 40 << 10


@cache
def _table() -> list[dict[str, Any]]:
    """Measured choices; written by `python benchmarks/kernels_attention.py --write`."""
    text = (Path(__file__).parent / "attention_table.json").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows


def way(device: str, dtype: torch.dtype, queries: int, keys: int, training: bool) -> str:
    """Say how `attend` computes: "products" or "sdpa", by the nearest measured number of queries and keys.

    What was not measured (another device or type) goes to the framework.
    """
    name = str(dtype).removeprefix("torch.")
    rows = [r for r in _table() if (r["device"], r["dtype"], r["training"]) == (device, name, training)]
    if not rows:
        return "sdpa"

    def distance(row: dict[str, Any]) -> float:
        return abs(math.log2(row["queries"] / queries)) + abs(math.log2(row["keys"] / keys))

    best: str = min(rows, key=distance)["best"]
    return best


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    *,
    scaling: float,
    causal: bool = False,
    dropout: float = 0.0,
    key_seed: int | None = None,
    prefix_k: Tensor | None = None,
    prefix_v: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend.

    Args:
        query: (B, H, T, D). key: (B, K, S, D). value: (B, K, S, Dv); K divides H.
        mask: (B or 1, H or 1, T or 1, S), boolean (True: may look) or added to the scores.
        causal: query i looks at keys up to i (and at all of the prefix).
        dropout: probability of dropping a probability; needs `key_seed`.
        prefix_k: (B or 1, K, P, D), put before the keys, open to every query. prefix_v: (B or 1, K, P, Dv).
        softcap: scores become `softcap · tanh(scores / softcap)` before the mask.

    Returns:
        (B, H, T, Dv), laid out so that `.transpose(1, 2)` is contiguous where the products were used.

    Raises:
        ConfigError: dropout without a seed, or one prefix without the other.
    """
    if dropout > 0.0 and key_seed is None:
        raise ConfigError(f"attend: dropout={dropout} needs key_seed; take one from luthier.core.key(...).")
    if (prefix_k is None) != (prefix_v is None):
        raise ConfigError("attend: prefix_k and prefix_v come together; one of them is missing.")
    offset = 0
    if prefix_k is not None and prefix_v is not None:
        offset = prefix_k.shape[2]
        key = torch.cat([prefix_k.to(key.dtype).expand(len(key), -1, -1, -1), key], dim=2)
        value = torch.cat([prefix_v.to(value.dtype).expand(len(value), -1, -1, -1), value], dim=2)
        if mask is not None:
            mask = F.pad(mask, (offset, 0), value=True if mask.dtype == torch.bool else 0.0)
    T, S = query.shape[2], key.shape[2]
    mask_trains = mask is not None and mask.requires_grad
    ragged = len(query) != len(key) or T == 0 or S == 0
    if not fast() or mask_trains or ragged or torch.is_autocast_enabled(query.device.type):
        return _formula(query, key, value, mask, scaling, causal, offset, dropout, key_seed, softcap)[0]
    training = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    few = query.shape[0] * query.shape[1] * max(T, 32) * S <= FEW_SCORES and query.device.type == "cpu"
    chosen = "sdpa" if few and not training else way(query.device.type, query.dtype, T, S, training)
    framework_can = dropout == 0.0 and softcap is None
    if framework_can and (chosen == "sdpa" or torch.compiler.is_compiling()):
        return _framework(query, key, value, mask, scaling, causal, offset)
    added, dead = _prepared(mask, query.dtype, causal, offset)
    settings: Settings = (scaling, causal, offset, dropout, key_seed, softcap)
    out: Tensor = Products.apply(query, key, value, added, dead, settings, training)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2)


def attention_interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend` with the signature of the framework's attention functions.

    Args:
        module: asked for `is_causal` (True where it does not say) and, for dropout, for `attention_seed`. Where no
            seed is set, one is drawn from torch's ambient generator, so that `torch.manual_seed` still decides.
        attention_mask: (B, 1 or H, T, S) boolean or additive; None means causal if the module is, else everything.
        kwargs: `softcap`, `position_bias` (added to the scores), `s_aux` (a sink per head) and `output_attentions`
            are obeyed; what only describes the batch is passed over.

    Returns:
        (B, T, H, Dv), contiguous; and the probabilities (B, H, T, S) if asked for by `output_attentions`, else None.

    Raises:
        ConfigError: a keyword that this function does not know and that may change the result.
    """
    unknown = [name for name, v in kwargs.items() if v is not None and v is not False and name not in _KNOWN]
    if unknown:
        raise ConfigError(
            f"attention of {type(module).__name__}: got {', '.join(sorted(unknown))}, which this attention does not"
            " know and would have to ignore. Load the model with attn_implementation='eager'."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    T, S = query.shape[2], key.shape[2]
    causal = causal and T > 1 and attention_mask is None
    bias, sink = kwargs.get("position_bias"), kwargs.get("s_aux")
    if causal and S > T:  # an empty static cache being filled: the keys beyond T are not there yet
        key, value, S = key[:, :, :T], value[:, :, :T], T
        bias = None if bias is None else bias[..., :T]
    if (
        T == 1
        and attention_mask is None
        and bias is None
        and dropout == 0.0
        and _is_one_token(query, key, value, kwargs)
    ):
        one = F.scaled_dot_product_attention(query, key, value, scale=scaling, enable_gqa=len(query[0]) > len(key[0]))
        return one.transpose(1, 2).contiguous(), None
    if bias is not None:
        attention_mask = _with_bias(attention_mask, bias)
    seed = None
    if dropout > 0.0:
        seed = getattr(module, "attention_seed", None)
        seed = int(torch.randint(2**62, ())) if seed is None else seed
    softcap = kwargs.get("softcap")
    if sink is not None or kwargs.get("output_attentions"):
        out, probabilities = _formula(
            query, key, value, attention_mask, scaling, causal, 0, dropout, seed, softcap, sink
        )
        return out.transpose(1, 2).contiguous(), probabilities if kwargs.get("output_attentions") else None
    out = attend(
        query,
        key,
        value,
        attention_mask,
        scaling=scaling,
        causal=causal,
        dropout=dropout,
        key_seed=seed,
        softcap=softcap,
    )
    return out.transpose(1, 2).contiguous(), None


# What models pass along and what does not change the result here: the window is in the mask, packing is in the mask.
_KNOWN = {
    *("softcap", "position_bias", "s_aux", "output_attentions"),
    *("sliding_window", "deterministic", "target_dtype", "layer_idx", "num_items_in_batch", "logits_to_keep"),
    *("position_ids", "position_embeddings", "cache_position", "token_type_ids", "input_ids", "seq_idx"),
    *("use_cache", "past_key_values", "past_key_value", "output_hidden_states", "return_dict"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}


def _is_one_token(query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    """Whether `attend` would hand a single query to the framework: asked first, its questions cost as much again."""
    return (
        fast()
        and query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and query.shape[0] * query.shape[1] * 32 * key.shape[2] <= FEW_SCORES
        and query.shape[0] == key.shape[0]
        and key.shape[2] > 0
        and key.shape[-1] == value.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not any(options.get(name) is not None for name in ("softcap", "s_aux"))
        and not options.get("output_attentions")
    )


def _with_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask.to(dtype)


# All layers of a model get the same mask object, so what is made of it is remembered for the last one.
_last: tuple[Any, ...] | None = None


def _prepared(
    mask: Tensor | None, dtype: torch.dtype, causal: bool, offset: int
) -> tuple[Tensor | None, Tensor | None]:
    """The mask as something to add, and which queries may look at nothing (None: all may look at something)."""
    global _last
    if mask is None:
        return None, None
    # What inference mode makes has no version and may not be saved for a backward pass later.
    remembers = not (mask.is_inference() or torch.is_inference_mode_enabled())
    asked = (mask._version, dtype, causal, offset) if remembers else None
    last = _last
    if remembers and last is not None and last[0]() is mask and last[1] == asked:
        return last[2], last[3]
    added = _additive(mask, dtype)
    assert added is not None
    dead = _dead(mask if not causal else _causal_cut(added, offset))
    if remembers:
        _last = (weakref.ref(mask), asked, added, dead)
    return added, dead


def _framework(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, causal: bool, offset: int
) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    kwargs: dict[str, Any] = {}
    if groups > 1:
        if mask is None and key.shape[-1] == value.shape[-1]:
            kwargs["enable_gqa"] = True
        else:  # the kernels that know groups do not know masks
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if causal and (mask is not None or offset or query.shape[2] != key.shape[2]):
        look = _may_look(query, key, offset)
        if mask is None:
            mask = look
        else:
            mask = mask & look if mask.dtype == torch.bool else mask.masked_fill(~look, -math.inf)
        causal = False
        if "enable_gqa" in kwargs:
            del kwargs["enable_gqa"]
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scaling, **kwargs)
    if mask is not None:
        dead = _dead(mask)
        out = out if dead is None else out.masked_fill(dead, 0.0)
    return out


def _may_look(query: Tensor, key: Tensor, offset: int) -> Tensor:
    look = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return look.tril_(offset)


def _causal_cut(mask: Tensor, offset: int) -> Tensor:
    T, S = mask.shape[-2:]
    look = torch.ones(T, S, dtype=torch.bool, device=mask.device).tril_(offset)
    return mask.masked_fill(~look, -math.inf)


def _dead(mask: Tensor) -> Tensor | None:
    """(..., T, 1), True for queries that may look at nothing; None if there are none."""
    dead = ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else (mask.amax(-1, keepdim=True) == -math.inf)
    return dead if bool(dead.any()) else None


def _formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    causal: bool,
    offset: int,
    p: float,
    seed: int | None,
    softcap: float | None,
    sink: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain definition, everything at once; also the probabilities."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    added = _additive(mask, scores.dtype)
    if causal:
        scores = scores.masked_fill(~_may_look(query, key, offset), -math.inf)
    if added is not None:
        scores = scores + added
    dead = scores.amax(-1, keepdim=True) == -math.inf
    scores = scores.masked_fill(dead, 0.0)
    if sink is not None:
        extra = sink.to(scores.dtype).view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, extra], dim=-1)
    wide = torch.promote_types(query.dtype, torch.float32)
    probabilities = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype).masked_fill(dead, 0.0)
    if sink is not None:
        probabilities = probabilities[..., :-1]
    if seed is not None and p > 0.0:
        probabilities = keyed_dropout(probabilities, p, seed)
    return probabilities @ value, probabilities

"""Attention by whichever way was measured to be fastest here: products in cache-sized blocks, or the framework's.

    out = softmax(scaling · q kᵀ  [soft-capped]  + mask) v          per head; fewer key heads are shared by groups

The products are cut into blocks of heads and queries whose scores fit the second-level cache, so T x T is never held
at once beyond a budget: the probabilities are kept for the backward pass while they are small and computed again where
they are not. A query that may look at nothing gives 0.

`attention_interface` has the signature that the framework asks of an attention function. Register it together with the
framework's `sdpa_mask` as its mask function: it wants a boolean (B, 1, T, S) mask or None under the same rules.
"""

import json
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luthier.core import ConfigError
from luthier.core.fast_paths import fast
from luthier.kernels.dropout import _LEVELS, _levels, kept_bits
from luthier.kernels.dropout import dropout as keyed_dropout

__all__ = ["attend", "attention_interface", "share_of_a_pass", "way"]

# B batch · H query heads · K key heads · G = H / K queries per key head · T queries · S keys · D width

# Scores of one block, for each thread that works on it. On one thread 1 MiB, the second-level cache, was best or within
# 5 % of it from T = 32 to 1024; two threads want 4 MiB at the least, and 64 cost nothing (docs/speed-log.md). A device
# with its own memory gets blocks that only bound the workspace.
BLOCK_BYTES = 2 << 20
DEVICE_BLOCK_BYTES = 256 << 20

# Scores of a pass without gradients up to which the framework's one call beats our several, on a CPU in bf16, with
# queries counted in its blocks of 32: 48 against 113 us at 12,288 of them, 69 against 104 at 36,864, level at 49,152.
FEW_SCORES = 40 << 10

# The CPU's bf16 softmax and the addition of a mask take 32 numbers of a row at a time and do the rest one by one, those
# of fp32 take 16. So short rows that leave a rest go through fp32, the shortest in plain steps (docs/speed-log.md).
LANES, WIDE_LANES = 32, 16
SHORT = 128

# Probabilities kept for one backward pass; above it they are computed again, which costs a quarter of the pass.
KEEP_BYTES = 16 << 20
_share = 1.0  # of a pass's rows and heads that are computed here


@contextmanager
def share_of_a_pass(share: float) -> Iterator[None]:
    """Inside, keep or compute again as a pass does of which this one has so large a share of the rows and heads.

    What a pass keeps grows with its rows along no single line: beyond `KEEP_BYTES` probabilities are kept no more. So
    whoever counts on few rows and heads what many would keep says here how few they are.

    >>> with share_of_a_pass(2 / 64):
    ...     pass
    """
    global _share
    before, _share = _share, share
    try:
        yield
    finally:
        _share = before


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
    settings = (scaling, causal, offset, dropout, key_seed, softcap)
    out: Tensor = _Products.apply(query, key, value, added, dead, settings, training)  # type: ignore[no-untyped-call]
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


class _Block(NamedTuple):
    b: slice
    k: slice
    t: slice
    end: int  # keys that any query of the block may look at


def _blocks(
    shape: tuple[int, int, int, int, int], size: int, causal: bool, offset: int, whole: bool, budget: int
) -> list[list[_Block]]:
    """Cut (B, K, T) into blocks of scores, in lists that share their keys.

    With `whole`, each block is one run of elements of (B, H, T, S), which the keyed mask needs.
    """
    B, K, G, T, S = shape
    head = G * S * size  # bytes of scores of one query position of one key head
    t = min(T, max(16, budget // head))
    if causal and not whole and T >= 512:
        t = min(t, max(128, T // 4))  # a smaller block looks at fewer keys that it may not see
    heads = max(1, budget // (head * t)) if t == T else 1
    if whole and t < T:
        t = T if G > 1 else t
    k = min(K, heads)
    b = max(1, min(B, heads // K)) if k == K else 1
    lists = []
    for b0 in range(0, B, b):
        for k0 in range(0, K, k):
            ends = [(t0, min(T, t0 + t)) for t0 in range(0, T, t)]
            lists.append(
                [
                    _Block(
                        slice(b0, min(B, b0 + b)),
                        slice(k0, min(K, k0 + k)),
                        slice(t0, t1),
                        min(S, t1 + offset) if causal and not whole else S,
                    )
                    for t0, t1 in ends
                ]
            )
    return lists


_Settings = tuple[float, bool, int, float, int | None, float | None]  # scaling, causal, offset, p, seed, softcap


class _Scores:
    """What both passes need to make one block of probabilities."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dead: Tensor | None,
        settings: _Settings,
    ) -> None:
        scaling, causal, offset, p, seed, softcap = settings
        B, H, T, _ = query.shape
        K, S = key.shape[1:3]
        self.shape = B, K, H // K, T, S
        self.q = _grouped(query, K)
        self.k, self.v = key, value
        self.scaling, self.causal, self.offset, self.softcap = scaling, causal, offset, softcap
        self.level = _levels(p) if seed is not None else 0
        self.seed = seed
        self.mask, self.dead = (
            None if m is None else _grouped(m.expand(B, -1, T, -1), 1 if m.shape[1] == 1 else K) for m in (mask, dead)
        )
        on_cpu = query.device.type == "cpu"
        self.lists = _blocks(
            self.shape,
            size=query.element_size(),
            causal=causal,
            offset=offset,
            whole=self.level > 0,
            budget=BLOCK_BYTES * torch.get_num_threads() if on_cpu else DEVICE_BLOCK_BYTES,
        )
        self.bytes = B * H * T * S * query.element_size() // (2 if causal and len(self.lists[0]) > 1 else 1)

    def rows(self, x: Tensor, at: _Block) -> Tensor:
        """(B, K, G, T, D) -> (heads of the block, G · queries, D)."""
        part = x[at.b, at.k, :, at.t]
        return part.reshape(-1, part.shape[2] * part.shape[3], part.shape[4])

    def keys(self, x: Tensor, at: _Block) -> Tensor:
        """(B, K, S, D) -> (heads of the block, keys, D)."""
        return x[at.b, at.k, : at.end].flatten(0, 1)

    def probabilities(self, q: Tensor, k: Tensor, at: _Block) -> tuple[Tensor, Tensor | None]:
        """(heads, G · queries, keys), and tanh(scores / softcap) where that is used."""
        w = torch.bmm(q, k.transpose(1, 2))
        short = _short(w)
        if short:
            w = w.float()
        slope = None
        if self.softcap is None:
            w.mul_(self.scaling)
        else:
            slope = w.mul_(self.scaling / self.softcap).tanh_()
            w = slope * self.softcap
        G, t = self.shape[2], at.t.stop - at.t.start
        view = w.view(at.b.stop - at.b.start, at.k.stop - at.k.start, G, t, at.end)
        if self.mask is not None:
            heads = at.k if self.mask.shape[1] > 1 else slice(None)
            view.add_(self.mask[at.b, heads, :, at.t, : at.end])
        if self.causal:
            # Keys before the block's first query are open to all of it; only the strip after needs a mask.
            first = min(at.t.start + self.offset, at.end)
            strip = torch.full((t, at.end - first), -math.inf, dtype=w.dtype, device=w.device).triu_(1)
            view[..., first:].add_(strip)
        w = _softmax(w).to(q.dtype) if short else torch.softmax(w, dim=-1)
        if self.dead is not None:
            heads = at.k if self.dead.shape[1] > 1 else slice(None)
            w.view(view.shape).masked_fill_(self.dead[at.b, heads, :, at.t], 0.0)
        return w, slope

    def drop(self, p: Tensor, at: _Block) -> Tensor:
        """Apply the keyed mask of this block's elements of (B, H, T, S)."""
        if self.level == 0 or self.seed is None:
            return p
        _, K, G, T, S = self.shape
        start = ((at.b.start * K + at.k.start) * G * T + at.t.start) * S
        kept = kept_bits(start, p.numel(), self.level, self.seed, p.device).view(p.shape)
        return torch.where(kept != 0, p, torch.zeros((), dtype=p.dtype, device=p.device)).mul_(
            _LEVELS / (_LEVELS - self.level)
        )


def _short(w: Tensor) -> bool:
    keys = w.shape[-1]
    return w.device.type == "cpu" and w.dtype == torch.bfloat16 and keys < SHORT and keys % LANES != 0


def _softmax(w: Tensor) -> Tensor:
    """Over the last axis of fp32 scores, which may be written to. A row of nothing but -inf becomes nan."""
    if w.shape[-1] >= WIDE_LANES:
        return torch.softmax(w, dim=-1)
    w = w.sub_(w.amax(-1, keepdim=True)).exp_()
    return w.div_(w.sum(-1, keepdim=True))


def _softmax_backward(grad: Tensor, w: Tensor) -> Tensor:
    """The gradient before a softmax from that behind it and from its result, in their type."""
    if not _short(w) or w.shape[-1] >= LANES:
        return torch._softmax_backward_data(grad, w, -1, w.dtype)
    wide, w_wide = grad.float(), w.float()
    if w.shape[-1] >= WIDE_LANES:
        return torch._softmax_backward_data(wide, w_wide, -1, wide.dtype).to(w.dtype)
    wide.mul_(w_wide)
    return wide.sub_(w_wide.mul_(wide.sum(-1, keepdim=True))).to(w.dtype)


def _causal_cut(mask: Tensor, offset: int) -> Tensor:
    T, S = mask.shape[-2:]
    look = torch.ones(T, S, dtype=torch.bool, device=mask.device).tril_(offset)
    return mask.masked_fill(~look, -math.inf)


class _Products(torch.autograd.Function):
    """Gives (B, T, H, Dv): written in the order in which the next layer reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dead: Tensor | None,
        settings: _Settings,
        training: bool,
    ) -> Tensor:
        # Copied once and kept so: the backward pass reads them again, and nobody else keeps the projections' outputs.
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
        scores = _Scores(query, key, value, mask, dead, settings)
        B, K, G, T, _ = scores.shape
        out = query.new_empty(B, T, K * G, value.shape[-1])
        by_head = _grouped(out.transpose(1, 2), K)
        ctx.settings = settings
        ctx.keeps = training and scores.softcap is None and scores.bytes <= KEEP_BYTES * _share
        kept = []
        for blocks in scores.lists:
            for at in blocks:
                w, _ = scores.probabilities(scores.rows(scores.q, at), scores.keys(key, at), at)
                part = by_head[at.b, at.k, :, at.t]
                part.copy_(torch.bmm(scores.drop(w, at), scores.keys(value, at)).view(part.shape))
                if ctx.keeps:
                    kept.append(w)
        ctx.save_for_backward(query, key, value, mask, dead, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, mask, dead, *kept = ctx.saved_tensors
        scores = _Scores(query, key, value, mask, dead, ctx.settings)
        wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
        K = scores.shape[1]
        g5 = _grouped(grad.transpose(1, 2), K)
        gq, gk, gv = (_like(x) if wants else None for x, wants in ((query, wants_q), (key, wants_k), (value, wants_v)))
        q5 = None if gq is None else _grouped(gq, K)
        remembered = iter(kept)
        for blocks in scores.lists:
            one = len(blocks) == 1
            sums: list[Tensor | None] = [None, None]
            for at in blocks:
                q, k, v, g = (
                    scores.rows(scores.q, at),
                    scores.keys(key, at),
                    scores.keys(value, at),
                    scores.rows(g5, at),
                )
                slope = None
                if ctx.keeps:
                    w = next(remembered)
                else:
                    w, slope = scores.probabilities(q, k, at)
                if wants_v:
                    _collect(sums, 1, torch.bmm(scores.drop(w, at).transpose(1, 2), g), one, scores.shape[4])
                if not (wants_q or wants_k):
                    continue
                gw = scores.drop(torch.bmm(g, v.transpose(1, 2)), at)
                gw = _softmax_backward(gw, w).mul_(scores.scaling)
                if slope is not None:
                    gw.mul_(1 - slope.square())
                if q5 is not None:
                    part = q5[at.b, at.k, :, at.t]
                    part.copy_(torch.bmm(gw, k).view(part.shape))
                if wants_k:
                    _collect(sums, 0, torch.bmm(gw.transpose(1, 2), q), one, scores.shape[4])
            for target, total in zip((gk, gv), sums, strict=True):
                if target is not None and total is not None:
                    part = target[blocks[0].b, blocks[0].k]
                    part.copy_(total.view(part.shape))
        return gq, gk, gv, None, None, None, None


def _grouped(x: Tensor, K: int) -> Tensor:
    """(B, H, ...) -> (B, K, H / K, ...), a view."""
    return x.view(x.shape[0], K, x.shape[1] // K, *x.shape[2:])


def _like(x: Tensor) -> Tensor:
    """(B, H, T, D), stored as (B, T, H, D): the layer below then takes its gradient without a copy."""
    B, H, T, D = x.shape
    return x.new_empty(B, T, H, D).transpose(1, 2)


def _collect(sums: list[Tensor | None], i: int, part: Tensor, one: bool, keys: int) -> None:
    """Add a block's gradient of keys or values; over several blocks of queries in fp32, zeros for keys not seen."""
    if one:
        sums[i] = part if part.shape[1] == keys else F.pad(part, (0, 0, 0, keys - part.shape[1]))
        return
    total = sums[i]
    if total is None:
        wide = torch.promote_types(part.dtype, torch.float32)
        total = sums[i] = torch.zeros(part.shape[0], keys, part.shape[2], dtype=wide, device=part.device)
    total[:, : part.shape[1]] += part

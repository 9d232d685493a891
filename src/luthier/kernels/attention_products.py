"""Attention as products in blocks of heads and queries whose scores fit the second-level cache.

T x T is never held at once beyond a budget: the probabilities are kept for the backward pass while they are small and
computed again where they are not.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.kernels.dropout import _LEVELS, _levels, kept_bits

__all__ = ["Products", "Settings", "share_of_a_pass"]

# B batch · H query heads · K key heads · G = H / K queries per key head · T queries · S keys · D width

# Scores of one block, for each thread that works on it. On one thread 1 MiB, the second-level cache, was best or within
# 5 % of it from T = 32 to 1024; two threads want 4 MiB at the least, and 64 cost nothing (docs/speed-log.md). A device
# with its own memory gets blocks that only bound the workspace.
BLOCK_BYTES = 2 << 20
DEVICE_BLOCK_BYTES = 256 << 20

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


Settings = tuple[float, bool, int, float, int | None, float | None]  # scaling, causal, offset, p, seed, softcap


class _Scores:
    """What both passes need to make one block of probabilities."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dead: Tensor | None,
        settings: Settings,
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


class Products(torch.autograd.Function):
    """Gives (B, T, H, Dv): written in the order in which the next layer reads it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dead: Tensor | None,
        settings: Settings,
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

"""From hidden states to the cross-entropy, a few rows of logits at a time.

    loss = Σ over supervised tokens of  logsumexp(l) - l[label],     l = hidden Wᵀ + bias,  or cap · tanh(l / cap)

The gradient of each block of logits is made while the block is there, and only ∂loss/∂hidden (N, d) is kept (and ∂W, if
the head trains). The logits of a whole batch, (N, V), never exist. Products run in the head's type or in the one asked
for, the softmax in fp32 (float64 for float64).

Softcap: Gemma Team 2024 (Gemma 2), arXiv:2408.00118, section 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from luthier.core import DataError
from luthier.core.fast_paths import fast

__all__ = ["linear_cross_entropy", "token_losses"]

CHUNK_BYTES = 32 << 20

# On CPU the softmax goes through a block in pieces of this many bytes, which stay in cache; the two large products want
# the whole block.
_PIECE_BYTES = 1 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, int]:
    """Sum the cross-entropy of the supervised tokens.

    Args:
        hidden: (N, d), the rows that predict `labels`; shift before calling.
        weight: (V, d), the head. bias: (V,) or None.
        labels: (N,), integers; rows with `ignore_index` are not computed at all.
        chunk_bytes: bytes of logits that may exist at once, at least one row.
        softcap: logits become `softcap · tanh(logits / softcap)`.
        dtype: of the products; None for the head's. Gradients come in the types of what they belong to.

    Returns:
        The sum (a mean would weigh tokens by the batch they fell into), at least fp32, and the number of tokens in it.

    Raises:
        DataError: a label is neither `ignore_index` nor a row of the head.
    """
    if hidden.ndim != 2 or labels.shape != hidden.shape[:1]:
        raise DataError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)} and labels {tuple(labels.shape)} do not fit;"
            " hidden must be (N, d) and labels (N,). Flatten batch and time first."
        )
    rows = (labels != ignore_index).nonzero().squeeze(1)
    kept = labels[rows]
    if len(kept) and not (int(kept.min()) >= 0 and int(kept.max()) < len(weight)):
        bad = int(kept.min()) if int(kept.min()) < 0 else int(kept.max())
        raise DataError(
            f"linear_cross_entropy: label {bad} is outside the head's {len(weight)} rows and is not {ignore_index};"
            " check that tokenizer and model belong together."
        )
    dtype = weight.dtype if dtype is None else dtype
    wide = torch.promote_types(dtype, torch.float32)
    if len(rows) == 0:
        return hidden.sum().to(wide) * 0.0, 0
    source = hidden if len(rows) == len(hidden) else hidden.index_select(0, rows)
    if not fast() or torch.is_autocast_enabled(hidden.device.type):
        low = None if bias is None else bias.to(dtype)
        logits = F.linear(source.to(dtype), weight.to(dtype), low).to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, kept, reduction="sum"), len(rows)
    wants = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (source, weight, bias))
    out: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        source, weight, bias, kept, chunk_bytes, softcap, dtype, wants
    )
    return out, len(rows)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        chunk_bytes: int,
        softcap: float | None,
        dtype: torch.dtype,
        wants: bool,
    ) -> Tensor:
        types = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        wants_hidden, wants_weight, wants_bias = (wants and n for n in ctx.needs_input_grad[:3])
        n, vocabulary = len(hidden), len(weight)
        chunk = max(1, min(n, chunk_bytes // (vocabulary * weight.element_size())))
        on_cpu = hidden.device.type == "cpu"
        piece = max(1, _PIECE_BYTES // (vocabulary * wide.itemsize)) if on_cpu else chunk
        losses = torch.empty(n, dtype=wide, device=hidden.device)
        grad_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if wants_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=hidden.device) if wants_weight else None
        grad_bias = torch.zeros(vocabulary, dtype=wide, device=hidden.device) if wants_bias else None
        block = torch.empty(chunk, vocabulary, dtype=dtype, device=hidden.device)
        wide_block = torch.empty(min(piece, chunk), vocabulary, dtype=wide, device=hidden.device)

        for start in range(0, n, chunk):
            h = hidden[start : start + chunk].to(dtype)
            logits = block[: len(h)]
            torch.mm(h, weight.T, out=logits)
            if bias is not None:
                logits.add_(bias)
            for first in range(0, len(h), piece):
                part = logits[first : first + piece]
                target = labels[start + first : start + first + len(part)].unsqueeze(1)
                e = wide_block[: len(part)].copy_(part)
                slope = None
                if softcap is not None:
                    e.div_(softcap).tanh_()
                    slope = 1 - e.square() if wants else None
                    e.mul_(softcap)
                top = e.amax(dim=1, keepdim=True)
                aim = e.gather(1, target)
                total = e.sub_(top).exp_().sum(dim=1, keepdim=True)
                losses[start + first : start + first + len(part)] = (total.log() + top - aim).squeeze(1)
                if wants:
                    # In fp32 before rounding: near certainty p - 1 would be lost in bf16.
                    e.scatter_add_(1, target, -total)
                    e.div_(total)
                    if slope is not None:
                        e.mul_(slope)
                    if grad_bias is not None:
                        grad_bias += e.sum(0)
                    part.copy_(e)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + len(h)])
            if grad_weight is not None:
                if wide == dtype:
                    grad_weight.addmm_(logits.T, h)
                else:
                    grad_weight += logits.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.types = types
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        made = [
            None if g is None else (g * grad.to(g.dtype)).to(dtype)
            for g, dtype in zip(ctx.saved_tensors, ctx.types, strict=True)
        ]
        return *made, None, None, None, None, None


def token_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    chunk_bytes: int = CHUNK_BYTES,
    softcap: float | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The cross-entropy of each token, for losses that are made of them: (N,), at least fp32.

    A block of logits is made, read and thrown away, and made again on the way back: what multiplies each token's
    gradient is known only then.

    Args:
        hidden: (N, d). labels: (N,), each a row of the head.
        weight, bias, chunk_bytes, softcap, dtype: see `linear_cross_entropy`.
    """
    dtype = weight.dtype if dtype is None else dtype
    wide = torch.promote_types(dtype, torch.float32)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)

    def block(states: Tensor, wanted: Tensor) -> Tensor:
        logits = F.linear(states.to(dtype), w, b).to(wide)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, wanted, reduction="none")

    size = max(1, chunk_bytes // (len(weight) * wide.itemsize))
    if len(hidden) == 0:
        return hidden.sum(-1).to(wide) * 0.0
    found: list[Tensor] = []
    for start in range(0, len(hidden), size):
        part = hidden[start : start + size], labels[start : start + size]
        if torch.is_grad_enabled():
            found.append(checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False))
        else:
            found.append(block(*part))
    return torch.cat(found)

"""The floor: the matrix products that a step of LoRA cannot do without, alone, in the same shapes and type.

Counted for LoRA on q and v: every product of the forward pass; in the backward pass the gradient of each layer's input
from the last layer down to the lowest trained place (nothing trains below the q and v of the first layer, so its q, k
and v hand no gradient to the embeddings, and its k gets none at all); the thin products of the updates and of their
gradients. Frozen weights get no gradient. A classifier reads the first token, so the end of its last layer is computed
for that one alone. The head's product and its backward product are for supervised tokens only.
Each layer has its own weights, so that they come from memory as they do in a step.
"""

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks._work import MODELS, rows
from luthier import samples

__all__ = ["Shape", "decoder", "encoder", "products", "seconds"]


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, as far as its products go."""

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    gated: bool
    outputs: int  # of the head

    @property
    def head_width(self) -> int:
        return self.width // self.heads


Product = tuple[int, int, int, int]
"""(b, m, k, n): b products of (m, k) by (k, n)"""


def products(
    shape: Shape, batch: int, length: int, head_rows: int, rank: int = 8, last_rows: int | None = None
) -> list[list[Product]]:
    """The products of one step, layer by layer, the head's at the end.

    Args:
        last_rows: tokens whose states the head reads; behind its attention the last layer is needed for no others.
            None for all.
    """
    n, d, wide = batch * length, shape.width, shape.heads * shape.head_width
    narrow = shape.key_heads * shape.head_width
    scores, heads = (batch * shape.heads, length, shape.head_width, length), batch * shape.heads
    mix = (heads, length, length, shape.head_width)
    found = []
    for layer in range(shape.layers):
        end = n if last_rows is None or layer < shape.layers - 1 else last_rows
        inner = [(1, end, d, shape.inner)] * (2 if shape.gated else 1) + [(1, end, shape.inner, d)]
        qkvo = [(1, n, d, wide), (1, n, d, narrow), (1, n, d, narrow), (1, end, wide, d)]
        ahead = [*qkvo, scores, mix, *inner]
        thin = [(1, n, d, rank), (1, n, rank, wide), (1, n, d, rank), (1, n, rank, narrow)]
        # dB = hᵀ g and dh = g B; dA = dhᵀ x
        thin += [(1, rank, n, wide), (1, n, wide, rank), (1, rank, n, d)]
        thin += [(1, rank, n, narrow), (1, n, narrow, rank), (1, rank, n, d)]
        back = [(b, m, n_, k) for b, m, k, n_ in [*inner, qkvo[3]]]
        # d probabilities, d values, d queries, and d keys where something below wants them
        back += [scores, mix, mix] + ([mix] if layer > 0 else [])
        if layer > 0:
            back += [(b, m, n_, k) for b, m, k, n_ in qkvo[:3]] + [(1, n, rank, d)] * 2
        found.append([*ahead, *back, *thin])
    found.append([(1, head_rows, d, shape.outputs), (1, head_rows, shape.outputs, d)])
    return found


def operations(layers: list[list[Product]]) -> int:
    """Multiplications and additions of all products."""
    return sum(2 * b * m * k * n for layer in layers for b, m, k, n in layer)


def seconds(layers: list[list[Product]], dtype: torch.dtype, repeats: int) -> float:
    """Median time of all products, one after the other, into memory that is already there."""
    chunk = 1024  # rows of the head's product at a time: nobody need hold all logits
    made: list[tuple[Tensor, Tensor, Tensor]] = []
    left: dict[tuple[int, ...], Tensor] = {}
    for layer in layers:
        for b, m, k, n in layer:
            for start in range(0, m, chunk) if n * m > 1 << 25 else (0,):
                some = min(chunk, m - start) if n * m > 1 << 25 else m
                first = left.setdefault((0, b, some, k), torch.randn(b, some, k).to(dtype))
                out = left.setdefault((1, b, some, n), torch.empty(b, some, n, dtype=dtype))
                if start == 0:
                    # Weights lie as (n, k); activations beside them are shared, they are warm in a step too.
                    second = (
                        torch.randn(b, n, k).to(dtype)
                        if b == 1
                        else left.setdefault((2, b, n, k), torch.randn(b, n, k).to(dtype))
                    )
                made.append((first, second.transpose(1, 2), out))
    times = []
    for turn in range(repeats + 1):
        start_time = time.perf_counter()
        for first, second, out in made:
            if len(first) == 1:
                torch.mm(first[0], second[0], out=out[0])
            else:
                torch.bmm(first, second, out=out)
        if turn:
            times.append(time.perf_counter() - start_time)
    return float(np.median(times))


def _shape(model: str, outputs: int | None = None) -> Shape:
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(samples.model_path(MODELS[model]))
    return Shape(
        layers=c.num_hidden_layers,
        width=c.hidden_size,
        inner=c.intermediate_size,
        heads=c.num_attention_heads,
        key_heads=getattr(c, "num_key_value_heads", c.num_attention_heads),
        gated=model == "decoder",
        outputs=outputs or c.vocab_size,
    )


def encoder(
    sample: str = "trec6", model: str = "encoder", batch: int = 32, bf16: bool = True, repeats: int = 3
) -> dict[str, Any]:
    """Rows a second of one epoch if nothing but its products were computed, in luthier's order of rows."""
    from transformers import AutoTokenizer

    from luthier.data.order import Order

    some = rows(sample)
    coded = AutoTokenizer.from_pretrained(samples.model_path(MODELS[model]))([r["text"] for r in some], truncation=True)
    lengths = np.asarray([len(ids) for ids in coded["input_ids"]], dtype=np.int64)
    order = Order(lengths, batch, 0, True)
    steps = Counter(
        (len(taken), int(lengths[taken].max())) for taken in (order.rows(0, s) for s in range(order.steps_per_epoch))
    )
    shape = _shape(model, len({r["label"] for r in some}))
    dtype = torch.bfloat16 if bf16 else torch.float32
    with torch.inference_mode():
        total = sum(
            count * seconds(products(shape, n, width, n, last_rows=n), dtype, repeats)
            for (n, width), count in steps.items()
        )
    done = sum(count * operations(products(shape, n, width, n, last_rows=n)) for (n, width), count in steps.items())
    return {
        "steady_rows_per_second": len(some) / total,
        "steady_tokens_per_second": float(lengths.sum()) / total,
        "gflops": done / total / 1e9,
        "gflop": done / 1e9,
    }


def decoder(
    batch: int = 8, length: int = 256, supervised: float = 1.0, bf16: bool = True, repeats: int = 3
) -> dict[str, Any]:
    """Tokens a second of one step if nothing but its products were computed."""
    shape = _shape("decoder")
    head_rows = batch * min(length - 1, round(supervised * length))
    layers = products(shape, batch, length, head_rows)
    with torch.inference_mode():
        took = seconds(layers, torch.bfloat16 if bf16 else torch.float32, repeats)
    return {
        "steady_tokens_per_second": batch * length / took,
        "steady_rows_per_second": batch / took,
        "gflops": operations(layers) / took / 1e9,
        "gflop": operations(layers) / 1e9,
    }

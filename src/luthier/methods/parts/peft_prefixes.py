"""Prefixes in peft's files, where they are a cache: every word stands behind them, and ours leave it where it was.

A word at i sees a key k of peft's prefix from i + P, and one of ours from i. With rotated positions that is the same
where our key is k turned back by P: R(i + P) q . k = R(i) q . R(-P) k. So keys are turned on their way, and both
compute the same. Where positions are added to the embedding, or bias the scores, no change of a prefix makes up for it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge, ConfigError
from luthier.methods.parts.peft_prompts import COUNTS, ONE, before_text, rows_before
from luthier.surgery import PeftIn, PeftOut, PeftTaken, PeftWhole

__all__ = ["prefix_form", "rotation_of", "turned"]

ROTATED = ("llama", "mistral", "qwen2", "qwen3")  # whole heads are turned, half by half, after the keys' own norm
STILL = ("default", "linear", "llama3")  # kinds of rotation that do not depend on the length of the text


def rotation_of(model: Any, anatomy: Anatomy) -> Any:
    """What turns the model's keys; None where positions are counted in another way."""
    found = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")]
    kind = getattr(found[0], "rope_type", "default") if found else None
    window = getattr(model.config, "sliding_window", None)
    if anatomy.model_type not in ROTATED or kind not in STILL or found[0].attention_scaling != 1 or window:
        return None
    return found[0]


def _why_not(anatomy: Anatomy) -> str:
    return (
        f"peft moves every word of the text behind the prefix, and on this {anatomy.model_type} model no keys make up "
        f"for that; on models of {', '.join(ROTATED)} without a window they do. Use lora, or serve it here."
    )


def turned(rows: Tensor, rotation: Any, anatomy: Anatomy, by: int) -> Tensor:
    """The rows with their keys turned by `by` positions. rows: (P, layers 2 n_kv d_head)."""
    cos, sin = rotation(rows[None].float(), torch.tensor([[abs(by)]], device=rows.device))  # (1, 1, d_head) each
    cos, sin = cos[0].to(rows.dtype), (sin[0] if by > 0 else -sin[0]).to(rows.dtype)
    heads, d = anatomy.n_kv_heads, anatomy.d_head
    parts = rows.view(len(rows), -1, 2, heads, d)  # (P, layers, keys and values, n_kv, d_head)
    keys = parts[:, :, 0]
    first, second = keys.chunk(2, dim=-1)
    keys = keys * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.stack([keys, parts[:, :, 1]], dim=2).flatten(1)


def prefix_form(
    type_: str,
    said: Callable[[PeftOut], dict[str, Any]],
    settings: Callable[[Mapping[str, Any]], dict[str, Any]],
    split: Callable[[Tensor, Mapping[str, Any]], dict[str, Tensor]],
    *,
    also: tuple[str, ...] = (),
    ignored: tuple[str, ...] = (),
) -> PeftWhole:
    """The form of a method whose keys and values stand before the text of every attention.

    Args:
        said: what peft's configuration says beside the counts.
        settings: ours beside the length, from it.
        split: the rows (P, layers 2 n_kv d_head) as we store them, in their order.
    """

    def out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
        before_text(going)
        anatomy = going.anatomy
        rotation = rotation_of(going.model, anatomy)
        if rotation is None:
            raise CannotMerge(f"{going.method.name}: {_why_not(anatomy)}")
        rows = turned(torch.cat(list(going.stored.values())), rotation, anatomy, going.method.length)
        # The width is that of all heads: peft divides it for grouped ones itself, as the model says.
        counts = (len(rows), anatomy.n_heads * anatomy.d_head, 1, anatomy.n_heads, max(anatomy.depths.values()))
        return {ONE: rows}, {**dict(zip(COUNTS, counts, strict=True)), **said(going)}

    def back(coming: PeftIn) -> PeftTaken:
        rows = rows_before(coming)
        rotation = rotation_of(coming.model, coming.anatomy)
        if rotation is None:
            raise ConfigError(f"{coming.where}: {_why_not(coming.anatomy)}")
        rows = turned(rows, rotation, coming.anatomy, -len(rows))
        return PeftTaken({"length": len(rows), **settings(coming.facts)}, split(rows, coming.facts))

    return PeftWhole(type_, out=out, back=back, prefix="base_model.", also=(*COUNTS, *also), ignored=ignored)

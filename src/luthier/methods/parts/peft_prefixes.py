"""Prefixes in peft's files, where they are a cache: every word stands behind them, and ours leave it where it was.

A word at i sees a key k of peft's prefix from i + P, and one of ours from i. With rotated positions that is the same
where our key is k turned back by P: R(i + P) q . k = R(i) q . R(-P) k. So keys are turned on their way, and both
compute the same. Where positions are added to the embedding, or bias the scores, no change of a prefix makes up for it.
"""

from typing import Any

import torch
from torch import Tensor

from luthier.anatomy import Anatomy
from luthier.core import CannotMerge, ConfigError
from luthier.methods.parts.peft_prompts import COUNTS, before_text, rows_before
from luthier.surgery import PeftIn, PeftOut, PeftTaken, PeftWhole

__all__ = ["PREFIXES"]

ROTATED = ("llama", "mistral", "qwen2", "qwen3")  # whole heads are turned, half by half, after the keys' own norm
STILL = ("default", "linear", "llama3")  # kinds of rotation that do not depend on the length of the text


def _rotation(model: Any, anatomy: Anatomy) -> Any:
    """What turns the model's keys.

    Raises:
        CannotMerge: the model counts positions in another way.
    """
    found = [m for m in model.modules() if hasattr(m, "inv_freq") and hasattr(m, "attention_scaling")]
    kind = getattr(found[0], "rope_type", "default") if found else None
    window = getattr(model.config, "sliding_window", None)
    if anatomy.model_type not in ROTATED or kind not in STILL or found[0].attention_scaling != 1 or window:
        raise CannotMerge(
            f"prefix_tuning: peft moves every word of the text behind the prefix, and on this {anatomy.model_type} "
            f"model no keys make up for that; on models of {', '.join(ROTATED)} without a window they do. Use lora, or "
            "serve it here."
        )
    return found[0]


def _turned(rows: Tensor, rotation: Any, anatomy: Anatomy, by: int) -> Tensor:
    """The rows with their keys turned by `by` positions. rows: (P, layers 2 n_kv d_head)."""
    cos, sin = rotation(rows[None].float(), torch.tensor([[abs(by)]], device=rows.device))  # (1, 1, d_head) each
    cos, sin = cos[0].to(rows.dtype), (sin[0] if by > 0 else -sin[0]).to(rows.dtype)
    heads, d = anatomy.n_kv_heads, anatomy.d_head
    parts = rows.view(len(rows), -1, 2, heads, d)  # (P, layers, keys and values, n_kv, d_head)
    keys = parts[:, :, 0]
    first, second = keys.chunk(2, dim=-1)
    keys = keys * cos + torch.cat([-second, first], dim=-1) * sin
    return torch.stack([keys, parts[:, :, 1]], dim=2).flatten(1)


def _out(going: PeftOut) -> tuple[dict[str, Tensor], dict[str, Any]]:
    before_text(going)
    rotation = _rotation(going.model, going.anatomy)
    rows = _turned(going.stored["prefix.self"], rotation, going.anatomy, going.method.length)
    anatomy = going.anatomy
    width, layers = anatomy.n_kv_heads * anatomy.d_head, max(anatomy.depths.values())
    said = dict(zip(COUNTS, (len(rows), width, 1, anatomy.n_kv_heads, layers), strict=True))
    # A width that peft divides itself, by its own heads: it asks the model for them.
    said |= {"token_dim": anatomy.n_heads * anatomy.d_head, "num_attention_heads": anatomy.n_heads}
    return {"prompt_embeddings": rows}, {**said, "encoder_hidden_size": width, "prefix_projection": False}


def _back(coming: PeftIn) -> PeftTaken:
    rows = rows_before(coming)
    try:
        rotation = _rotation(coming.model, coming.anatomy)
    except CannotMerge as error:
        raise ConfigError(f"{coming.where}: {error}") from error
    rows = _turned(rows, rotation, coming.anatomy, -len(rows))
    return PeftTaken({"length": len(rows), "mlp_width": 0}, {"prefix.self": rows})


PREFIXES = PeftWhole(
    "PREFIX_TUNING",
    out=_out,
    back=_back,
    prefix="base_model.",
    also=COUNTS,
    ignored=("encoder_hidden_size", "prefix_projection", "init_weights"),
)
"""Prefix tuning's form."""

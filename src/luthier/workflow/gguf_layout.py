"""Where the numbers of a decoder stand in a GGUF file, and what the file says of its shape.

Names are those of the package gguf. What it leaves open is here: which classes of transformers an architecture of
llama.cpp computes, and that "llama" rotates neighbouring numbers of a head where transformers rotates its two halves,
so that the rows of q and k are stored in another order:

    row 2 i + j of a head there  =  row j d/2 + i here        i < d/2, j in (0, 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import CannotMerge

__all__ = ["TYPES", "Layout", "describe", "layout_of", "layout_of_config", "stored_as"]

# Class of transformers -> architecture of llama.cpp, and whether that rotates neighbours.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
}
TYPES = ("f32", "f16", "bf16", "q8_0")


@dataclass(frozen=True)
class Layout:
    """How one model stands in a file.

    Attributes:
        arch: llama.cpp's name.
        turned: the rows of q and k stand in the order of neighbours.
        heads: of queries, and of keys.
    """

    arch: str
    turned: bool
    heads: tuple[int, int]
    n_layers: int

    def name(self, ours: str) -> str:
        """The file's name of a tensor of transformers'.

        Raises:
            CannotMerge: the file has no place for it.
        """
        import gguf

        number = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[self.arch]
        stem, _, end = ours.rpartition(".")
        found = gguf.get_tensor_name_map(number, self.n_layers).get_name(stem)
        if found is None or end not in ("weight", "bias"):
            raise CannotMerge(f"{ours}: a file of llama.cpp's {self.arch} has no place for it. Nearest is --to merged.")
        return f"{found}.{end}"

    def to_file(self, ours: str, value: Tensor) -> Tensor:
        """A tensor, or the B of an update of it (rows, ...), with its rows in the file's order."""
        heads = self._heads(ours)
        if heads is None:
            return value
        return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    def from_file(self, ours: str, value: Tensor) -> Tensor:
        """The inverse of `to_file`."""
        heads = self._heads(ours)
        if heads is None:
            return value
        return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    def _heads(self, ours: str) -> int | None:
        kind = next((k for k in ("q_proj", "k_proj") if f".{k}." in ours), None)
        return None if kind is None or not self.turned else self.heads[kind == "k_proj"]


def layout_of(model: Any) -> Layout:
    """The layout of a model of transformers.

    Raises:
        CannotMerge: no architecture of llama.cpp that is known here computes it.
    """
    return layout_of_config(model.config, type(model).__name__)


def layout_of_config(config: Any, class_name: str) -> Layout:
    """The same, of a configuration and the name of the model's class."""
    if class_name not in ARCHITECTURES:
        known = ", ".join(name.removesuffix("ForCausalLM") for name in ARCHITECTURES)
        raise CannotMerge(
            f"{class_name}: files for llama.cpp are written for {known}. Nearest is --to merged, which llama.cpp's own "
            "converter reads."
        )
    rope = config.rope_parameters or {}
    kind, window = rope.get("rope_type", "default"), getattr(config, "sliding_window", None)
    if kind not in ("default", "linear"):
        raise CannotMerge(
            f"rope_type {kind!r}: only default and linear positions are written here. Nearest is --to merged, which "
            "llama.cpp's own converter reads."
        )
    if window is not None and getattr(config, "use_sliding_window", True) and window < config.max_position_embeddings:
        raise CannotMerge(
            f"a sliding window of {window} tokens: llama.cpp's {ARCHITECTURES[class_name][0]} attends to all, so long "
            "texts would be answered otherwise. Nearest is --to merged."
        )
    arch, turned = ARCHITECTURES[class_name]
    heads = (config.num_attention_heads, config.num_key_value_heads)
    return Layout(arch, turned, heads, config.num_hidden_layers)


def describe(writer: Any, config: Any, layout: Layout) -> None:
    """Write the shape of a model into a file's metadata."""
    import gguf

    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters or {}
    writer.add_block_count(layout.n_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(layout.heads[0])
    writer.add_head_count_kv(layout.heads[1])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_vocab_size(config.vocab_size)
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def stored_as(value: Tensor, kind: str) -> tuple[Any, Any]:
    """(numbers, the package's type) of a tensor. Vectors stay in f32, as llama.cpp has them.

    Rows that do not divide into blocks of 32 are held as f16 where q8_0 is asked for.

    Raises:
        CannotMerge: a number is too large for f16.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    array = value.detach().float().cpu().contiguous().numpy()
    if value.dim() < 2 or kind == "f32":
        return array, types.F32
    if kind == "q8_0" and value.shape[-1] % 32 == 0:
        return gguf.quants.quantize(array, types.Q8_0), types.Q8_0
    if kind == "bf16":
        halves = value.detach().to(torch.bfloat16).contiguous().cpu().view(torch.int16).numpy()
        return halves.view(np.uint8), types.BF16
    largest = float(np.abs(array).max())
    if largest > 65504:
        raise CannotMerge(f"a weight of {largest:.3g} does not fit f16. Write --dtype bf16 or f32.")
    return array.astype(np.float16), types.F16

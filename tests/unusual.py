"""Tiny random models of architectures that do something their kin do not; `tiny.py` has the promised ones."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor

__all__ = [
    "COMMON",
    "IMAGE",
    "UNUSUAL",
    "WHISPER",
    "clip",
    "gemma4",
    "learnt",
    "llama",
    "llava",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_next",
    "random_model",
    "seen",
    "whisper",
    "word_ids",
]

COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IMAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
WHISPER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 128,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


def random_model(cls: Any, config: Any, seed: int = 0) -> Any:
    """A model in evaluation mode, whose numbers are all spread: no bias is 0, no norm is 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls(config)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return model.eval()


def llama(seed: int = 0, **settings: Any) -> Any:
    """A Llama with a language-model head."""
    settings = {**COMMON, "num_key_value_heads": 2, "tie_word_embeddings": False, **settings}
    return random_model(hf.LlamaForCausalLM, hf.LlamaConfig(**settings), seed)


def learnt(tuned: Any, scale: float = 0.2, name: str | None = None) -> Any:
    """Move the trained numbers away from their start, as training would."""
    with torch.no_grad():
        for j, parameter in enumerate(tuned.trained(name).values()):
            draw = torch.Generator().manual_seed(j)
            parameter.add_((scale * torch.randn(parameter.shape, generator=draw)).to(parameter.dtype))
    return tuned


def word_ids(rows: int = 2, length: int = 8, seed: int = 1) -> Tensor:
    """Ids of words, (rows, length); none is a special token."""
    return torch.randint(4, 120, (rows, length), generator=torch.Generator().manual_seed(seed))


_TEXT: dict[str, Any] = {**COMMON, "max_position_embeddings": 128, "num_key_value_heads": 2}
_TOWER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_LINEAR: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}


def gemma4(**settings: Any) -> Any:
    """Gemma 4: two kinds of attention, an input of its own for each layer; `settings` make layers share keys."""
    config = hf.Gemma4TextConfig(
        **{**COMMON, "num_hidden_layers": 4, "num_key_value_heads": 2},
        **{
            "head_dim": 8,
            "global_head_dim": 16,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            **settings,
        },
    )
    return random_model(hf.Gemma4ForCausalLM, config)


def qwen3_next() -> Any:
    """Three layers of linear attention to one of softmax, and experts."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = hf.Qwen3NextConfig(**_LINEAR, **experts, shared_expert_intermediate_size=16)
    return random_model(hf.Qwen3NextForCausalLM, config)


def qwen3_5() -> Any:
    """Three layers of linear attention to one of softmax."""
    return random_model(hf.Qwen3_5ForCausalLM, hf.Qwen3_5TextConfig(**_LINEAR))


def llava() -> Any:
    """A Llama that sees by CLIP's image tower."""
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_TEXT),
        vision_config=hf.CLIPVisionConfig(**_TOWER),
        image_token_id=5,
        image_token_index=5,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    return random_model(hf.LlavaForConditionalGeneration, config)


def gemma3_vision() -> Any:
    """A Gemma 3 that sees by SigLIP's image tower."""
    config = hf.Gemma3Config(
        text_config={**_TEXT, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        vision_config=_TOWER,
        mm_tokens_per_image=16,
        image_token_index=5,
        image_token_id=5,
        boi_token_index=7,
        eoi_token_index=8,
    )
    return random_model(hf.Gemma3ForConditionalGeneration, config)


def qwen2_vl() -> Any:
    """Positions on three axes."""
    config = hf.Qwen2VLConfig(
        text_config={
            **_TEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "embed_dim": 16,
            "hidden_size": 32,
            "num_heads": 2,
            "mlp_ratio": 2,
            "patch_size": 4,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "in_channels": 3,
        },
        image_token_id=5,
        video_token_id=6,
        vision_start_token_id=7,
        vision_end_token_id=8,
    )
    return random_model(hf.Qwen2VLForConditionalGeneration, config)


def clip() -> Any:
    """Two towers of equal right."""
    config = hf.CLIPConfig(
        text_config={**COMMON, "max_position_embeddings": 24}, vision_config=IMAGE, projection_dim=16
    )
    return random_model(hf.CLIPModel, config)


def whisper() -> Any:
    """Reads sound and writes words."""
    return random_model(hf.WhisperForConditionalGeneration, hf.WhisperConfig(**WHISPER))


def seen(name: str) -> dict[str, Tensor]:
    """Two rows of words, each with an image where the model of that name has a tower."""
    words = torch.randint(10, 120, (2, 8), generator=torch.Generator().manual_seed(0))
    if name not in ("llava", "gemma3_vision", "qwen2_vl"):
        return {"input_ids": words, "attention_mask": torch.ones_like(words)}
    image = torch.tensor([[7, 5, 5, 5, 5, 8]] * 2) if name == "qwen2_vl" else torch.tensor([[5] * 16] * 2)
    ids = torch.cat([words[:, :2], image, words[:, 2:]], 1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    draw = torch.Generator().manual_seed(1)
    if name == "qwen2_vl":
        batch |= {"pixel_values": torch.randn(32, 96, generator=draw), "mm_token_type_ids": (ids == 5).long()}
        return batch | {"image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    batch["pixel_values"] = torch.randn(2, 3, 16, 16, generator=draw)
    if name == "gemma3_vision":
        batch["token_type_ids"] = (ids == 5).long()
    return batch


UNUSUAL: dict[str, Callable[[], Any]] = {
    "gemma4": gemma4,
    "gemma4_shared_keys": lambda: gemma4(num_kv_shared_layers=2),
    "gemma4_keys_as_values": lambda: gemma4(attention_k_eq_v=True, num_global_key_value_heads=1),
    "qwen3_next": qwen3_next,
    "qwen3_5": qwen3_5,
    "llava": llava,
    "gemma3_vision": gemma3_vision,
    "qwen2_vl": qwen2_vl,
}

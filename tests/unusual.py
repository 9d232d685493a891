"""Tiny random models of architectures that do something their kin do not; `tiny.py` has the promised ones."""

from typing import Any

import torch
import transformers as hf
from torch import Tensor

__all__ = ["COMMON", "IMAGE", "WHISPER", "learnt", "random_model", "word_ids"]

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

"""Tiny random models of every architecture we promise, with dimensions that are all different.

Hidden width 48, inner width 80, 3 layers, 4 heads, 2 key-value heads where the architecture has grouped heads, 131
words: an edit that mixes two of them up cannot pass. Biases and norm parameters are moved away from 0 and 1, for the
same reason. Dropout is not zero, so training mode differs from evaluation mode.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

__all__ = ["ALSO", "TINY", "class_of", "config_of", "inputs", "tasks", "tiny"]

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB, POSITIONS, CLASSES, EXPERTS = (
    48,
    80,
    3,
    4,
    2,
    12,
    131,
    64,
    5,
    3,
)

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": CLASSES}
# RoBERTa and MPNet count positions from the padding id + 1 on.
_FAIRSEQ = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "max_position_embeddings": POSITIONS + 2}
_BERT = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": 0.1,
    **_IDS,
}
_LLAMA = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
    "attention_dropout": 0.1,
    "tie_word_embeddings": False,
    **_IDS,
}
_T5 = {
    "d_model": HIDDEN,
    "d_kv": 10,
    "d_ff": INNER,
    "num_layers": LAYERS,
    "num_decoder_layers": 2,
    "num_heads": HEADS,
    "vocab_size": VOCAB,
    "dropout_rate": 0.1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 9,
    "relative_attention_max_distance": 20,
    **_IDS,
}

# name -> (stem of the class names, settings, tasks it has a class for)
_ENCODER, _DECODER = ("base", "classification", "tokens"), ("base", "lm", "classification", "tokens")
_MODELS: dict[str, tuple[str, Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
    "bert": ("Bert", hf.BertConfig, _BERT, _ENCODER),
    "roberta": ("Roberta", hf.RobertaConfig, {**_BERT, **_FAIRSEQ}, _ENCODER),
    "distilbert": (
        "DistilBert",
        hf.DistilBertConfig,
        {
            "dim": HIDDEN,
            "hidden_dim": INNER,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.1,
            "attention_dropout": 0.1,
            **_IDS,
        },
        _ENCODER,
    ),
    "albert": (
        "Albert",
        hf.AlbertConfig,
        {**_BERT, "embedding_size": 20, "num_hidden_groups": 1, "inner_group_num": 1, "classifier_dropout_prob": 0.1},
        _ENCODER,
    ),
    "electra": ("Electra", hf.ElectraConfig, {**_BERT, "embedding_size": 20}, _ENCODER),
    "mpnet": (
        "MPNet",
        hf.MPNetConfig,
        {**_BERT, **_FAIRSEQ},
        _ENCODER,
    ),
    "deberta-v2": (
        "DebertaV2",
        hf.DebertaV2Config,
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_biased_input": False,
            "pooler_dropout": 0.1,
            "pooler_hidden_act": "gelu",
        },
        _ENCODER,
    ),
    "modernbert": (
        "ModernBert",
        hf.ModernBertConfig,
        {
            **_LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
            "embedding_dropout": 0.1,
            "mlp_dropout": 0.1,
            "classifier_dropout": 0.1,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "tie_word_embeddings": True,
        },
        _ENCODER,
    ),
    "gpt2": (
        "GPT2",
        hf.GPT2Config,
        {
            "n_embd": HIDDEN,
            "n_inner": INNER,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": POSITIONS,
            "vocab_size": VOCAB,
            **_IDS,
        },
        _DECODER,
    ),
    "gpt-neox": (
        "GPTNeoX",
        hf.GPTNeoXConfig,
        {**_BERT, "hidden_dropout": 0.1, "attention_dropout": 0.1, "tie_word_embeddings": False, "rotary_pct": 0.5},
        _DECODER,
    ),
    "opt": (
        "OPT",
        hf.OPTConfig,
        {
            "hidden_size": HIDDEN,
            "ffn_dim": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS,
            "word_embed_proj_dim": 20,
            "dropout": 0.1,
            **_IDS,
        },
        ("base", "lm", "classification"),
    ),
    "bloom": (
        "Bloom",
        hf.BloomConfig,
        {
            "hidden_size": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "vocab_size": VOCAB,
            "hidden_dropout": 0.1,
            "attention_dropout": 0.1,
            **_IDS,
        },
        _DECODER,
    ),
    "llama": ("Llama", hf.LlamaConfig, {**_LLAMA, "attention_bias": True, "mlp_bias": True}, _DECODER),
    "mistral": ("Mistral", hf.MistralConfig, {**_LLAMA, "head_dim": 10, "sliding_window": 16}, _DECODER),
    "qwen2": ("Qwen2", hf.Qwen2Config, {**_LLAMA, "tie_word_embeddings": True}, _DECODER),
    "qwen3": ("Qwen3", hf.Qwen3Config, {**_LLAMA, "head_dim": 10, "tie_word_embeddings": True}, _DECODER),
    "gemma2": (
        "Gemma2",
        hf.Gemma2Config,
        {**_LLAMA, "head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 16, "tie_word_embeddings": True},
        _DECODER,
    ),
    "gemma3": (
        "Gemma3Text",
        hf.Gemma3TextConfig,
        {**_LLAMA, "head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 16, "tie_word_embeddings": True},
        ("base", "lm", "classification"),
    ),
    "phi3": ("Phi3", hf.Phi3Config, {**_LLAMA, "resid_pdrop": 0.1, "sliding_window": None}, _DECODER),
    "mixtral": (
        "Mixtral",
        hf.MixtralConfig,
        {**_LLAMA, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
        _DECODER,
    ),
    "t5": ("T5", hf.T5Config, {**_T5, "feed_forward_proj": "relu"}, ("base", "seq2seq", "classification")),
    "t5-v1.1": (
        "T5",
        hf.T5Config,
        {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        ("base", "seq2seq", "classification"),
    ),
    "bart": (
        "Bart",
        hf.BartConfig,
        {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": 2,
            "encoder_ffn_dim": INNER,
            "decoder_ffn_dim": 72,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "vocab_size": VOCAB,
            "max_position_embeddings": POSITIONS,
            "dropout": 0.1,
            "decoder_start_token_id": 2,
            "forced_eos_token_id": None,
            **_IDS,
        },
        ("base", "seq2seq", "classification"),
    ),
    "vit": (
        "ViT",
        hf.ViTConfig,
        {
            "hidden_size": HIDDEN,
            "intermediate_size": INNER,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "hidden_dropout_prob": 0.1,
            "attention_probs_dropout_prob": 0.1,
            "image_size": 12,
            "patch_size": 4,
            "num_labels": CLASSES,
        },
        ("base", "classification"),
    ),
}

TINY: tuple[str, ...] = tuple(_MODELS)

# More architectures, for the tests of the anatomy alone: each shares a table file with one of those above.
_LM = ("base", "lm")
_MOE = {"num_experts_per_tok": 2, "head_dim": 12}
_MODELS |= {
    "olmoe": ("Olmoe", hf.OlmoeConfig, {**_LLAMA, **_MOE, "num_experts": EXPERTS}, _LM),
    "qwen3-moe": (
        "Qwen3Moe",
        hf.Qwen3MoeConfig,
        {**_LLAMA, **_MOE, "num_experts": EXPERTS, "moe_intermediate_size": 56, "decoder_sparse_step": 1},
        _LM,
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        hf.Qwen2MoeConfig,
        {
            **_LLAMA,
            **_MOE,
            "num_experts": EXPERTS,
            "moe_intermediate_size": 56,
            "shared_expert_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
        _LM,
    ),
    "gpt-oss": (
        "GptOss",
        hf.GptOssConfig,
        {
            **_LLAMA,
            **_MOE,
            "intermediate_size": HIDDEN,  # square, as in the models that are out there
            "num_local_experts": EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        _LM,
    ),
    "glm": ("Glm", hf.GlmConfig, {**_LLAMA, "head_dim": 10, "attention_bias": True}, _LM),
    "glm4": ("Glm4", hf.Glm4Config, {**_LLAMA, "head_dim": 10, "attention_bias": True}, _LM),
    "persimmon": (
        "Persimmon",
        hf.PersimmonConfig,
        {
            **{k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
            "qk_layernorm": False,
            "hidden_dropout": 0.1,
        },
        _LM,
    ),
    "openai-gpt": (
        "OpenAIGPT",
        hf.OpenAIGPTConfig,
        {"n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": POSITIONS, "vocab_size": VOCAB, **_IDS},
        _LM,
    ),
    "modernbert-decoder": (
        "ModernBertDecoder",
        hf.ModernBertDecoderConfig,
        {
            **_LLAMA,
            "attention_bias": True,
            "mlp_bias": True,
            "norm_bias": True,
            "local_attention": 8,
            "cls_token_id": 1,
        },
        _LM,
    ),
    "olmo2": ("Olmo2", hf.Olmo2Config, _LLAMA, _LM),
    "phi": ("Phi", hf.PhiConfig, {**_LLAMA, "partial_rotary_factor": 0.5, "resid_pdrop": 0.1}, _LM),
    "mbart": ("MBart", hf.MBartConfig, _MODELS["bart"][2], ("base", "seq2seq")),
}
ALSO: tuple[str, ...] = tuple(name for name in _MODELS if name not in TINY)

_ENDING = {
    "base": "Model",
    "lm": "ForCausalLM",
    "seq2seq": "ForConditionalGeneration",
    "classification": "ForSequenceClassification",
    "tokens": "ForTokenClassification",
}


def tasks(name: str) -> tuple[str, ...]:
    """The tasks that `tiny(name, task)` can build."""
    return _MODELS[name][3]


def class_of(name: str, task: str) -> Any:
    """The Hugging Face class, such as `BertForSequenceClassification`."""
    stem = _MODELS[name][0]
    if name in ("gpt2", "openai-gpt") and task == "lm":
        return hf.GPT2LMHeadModel if name == "gpt2" else hf.OpenAIGPTLMHeadModel
    if name == "vit" and task == "classification":
        return hf.ViTForImageClassification
    if name == "gemma3" and task == "lm":
        return hf.Gemma3ForCausalLM
    return getattr(hf, stem + _ENDING[task])


def config_of(name: str, **changes: Any) -> Any:
    """A fresh configuration; `changes` replace settings."""
    _, make, settings, _ = _MODELS[name]
    return make(**{**settings, **changes})


def tiny(name: str, task: str = "", seed: int = 0, device: str = "cpu", **changes: Any) -> Any:
    """A tiny random model in evaluation mode.

    Args:
        name: one of `TINY`.
        task: "base", "classification", "tokens", "lm" or "seq2seq"; empty takes "lm", "seq2seq" or "classification",
            whichever the architecture has first.
        seed: the weights are a function of (name, task, seed); the ambient generator is left as it was.
        device: "cpu", or "meta" for shapes alone.
        changes: settings of the configuration to replace, such as `num_labels=2`.
    """
    if not task:
        task = next(t for t in ("lm", "seq2seq", "classification") if t in tasks(name))
    if task not in tasks(name):
        raise ValueError(f"tiny {name!r} has no task {task!r}; it has {', '.join(tasks(name))}.")
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model = class_of(name, task)(config_of(name, **changes))
        if device != "meta":
            _perturb(model, seed)
    return model.eval()


@torch.no_grad()
def _perturb(model: nn.Module, seed: int) -> None:
    """Give every parameter a spread of its own: nothing stays at exactly 0 or 1."""
    draw = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=draw)
        scale = 0.1 if parameter.dim() < 2 else 0.12
        parameter.add_(scale * noise)


def inputs(
    model: Any, batch: int = 3, length: int = 7, padded: bool = True, seed: int = 0, side: str = "right"
) -> dict[str, Tensor]:
    """One batch that `model(**inputs(model))` accepts.

    Args:
        model: a model that `tiny` made.
        padded: row `b` carries `b` padding tokens (at least two real tokens stay).
        seed: of the token ids.
        side: where the padding goes, "right" or "left".

    Returns:
        input_ids and attention_mask (batch, length), or pixel_values (batch, 3, side, side); decoder_input_ids
        (batch, length - 2) where the model is an encoder-decoder without a loss of its own; labels where the model
        computes a loss.
    """
    config, draw = model.config, torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    kind = type(model).__name__
    made: dict[str, Tensor] = {}
    if getattr(config, "image_size", None):
        made["pixel_values"] = torch.randn(batch, 3, config.image_size, config.image_size, generator=draw)
    else:
        vocab = config.vocab_size if hasattr(config, "vocab_size") else config.decoder.vocab_size
        pad = config.pad_token_id if hasattr(config, "pad_token_id") else config.decoder.pad_token_id
        ids = torch.randint(4, vocab, (batch, length), generator=draw)
        mask = torch.ones_like(ids)
        if padded:
            for row in range(batch):
                pads = min(row, length - 2)
                where = slice(length - pads, length) if side == "right" else slice(0, pads)
                ids[row, where], mask[row, where] = pad, 0
        if kind.endswith("ForSequenceClassification") and getattr(config, "is_encoder_decoder", False):
            for row in range(batch):  # the head reads the last </s>, and every row must have equally many
                ids[row, int(mask[row].nonzero()[-1])] = config.eos_token_id
        made = {"input_ids": ids, "attention_mask": mask}
    if kind.endswith(("ForSequenceClassification", "ForImageClassification")):
        made["labels"] = torch.randint(config.num_labels, (batch,), generator=draw)
    elif kind.endswith("ForTokenClassification"):
        made["labels"] = torch.randint(config.num_labels, (batch, length), generator=draw)
        made["labels"][made["attention_mask"] == 0] = -100
    elif kind.endswith(("ForConditionalGeneration", "EncoderDecoderModel")):
        made["labels"] = torch.randint(4, vocab, (batch, length - 2), generator=draw)
    elif kind.endswith(("ForCausalLM", "LMHeadModel")):
        made["labels"] = made["input_ids"].masked_fill(made["attention_mask"] == 0, -100)
    elif getattr(config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = torch.randint(4, config.vocab_size, (batch, length - 2), generator=draw)
    return {name: tensor.to(device) for name, tensor in made.items()}

"""What other libraries call things, and what they are called here: who types the one is answered with the other."""

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["PLACES", "SETTINGS", "answer", "place_here"]

SETTINGS: Mapping[str, str] = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "sites",
    "init": "start",
    "init_lora_weights": "start",
    "num_virtual_tokens": "length",
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch",
    "train_batch_size": "batch",
    "batch_size": "batch",
    "gradient_accumulation_steps": "accumulate",
    "warmup_ratio": "warmup",
    "lr_scheduler_type": "schedule",
    "max_grad_norm": "clip",
    "max_seq_length": "max_length",
    "output_dir": "out",
    "optimizer": "optimiser",
}

PLACES: Mapping[str, str] = {
    "q_proj": "attn.q",
    "k_proj": "attn.k",
    "v_proj": "attn.v",
    "o_proj": "attn.o",
    "out_proj": "attn.o",
    "query": "attn.q",
    "key": "attn.k",
    "value": "attn.v",
    "query_key_value": "attn",
    "qkv_proj": "attn",
    "c_attn": "attn",
    "gate_proj": "ffn.gate",
    "up_proj": "ffn.up",
    "down_proj": "ffn.down",
    "fc1": "ffn.up",
    "fc2": "ffn.down",
    "all-linear": "*",
}


def place_here(name: str) -> str | None:
    """Our name of a place in a model's blocks that others call `name`: the last part of a module's name."""
    return PLACES.get(name) or PLACES.get(name.rpartition(".")[2])


def answer(name: str, known: Iterable[str], value: Any = None) -> str:
    """A sentence with a leading blank that says what `name` is called here; empty where nothing is known of it.

    >>> answer("lora_alpha", ["rank", "alpha"], 8)
    ' lora_alpha is called alpha here: alpha=8.'
    >>> answer("target_modules", ["sites"], ["q_proj", "v_proj"])
    " target_modules is called sites here: sites='attn.q,attn.v'."

    Args:
        name: what was given.
        known: names that are taken here.
        value: what was given for it.
    """
    ours = SETTINGS.get(name.lstrip("-").replace("-", "_"))
    if ours is None or ours not in {k.rpartition(".")[2] for k in known}:
        return ""
    if ours == "sites" and value is not None:
        names = value.split(",") if isinstance(value, str) else [str(v) for v in value]
        value = ",".join(dict.fromkeys(place_here(n.strip()) or n.strip() for n in names))
    example = f": {ours}={value!r}" if value is not None else ""
    return f" {name} is called {ours} here{example}."

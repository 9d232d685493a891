"""The work that all contestants do: the same rows, the same numbers. No torch, no luthier at import."""

import json
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MODELS", "blocks", "llama_folder", "measured", "model_folder", "rows", "write_rows"]

MODELS = {"encoder": "minilm-l6", "encoder_large": "mpnet-base", "decoder": "smollm2-135m"}


def model_folder(model: str, folder: Path) -> Path:
    """Where the model is: that of a sample, or for "llama" a random one, written to `folder`."""
    from luthier import samples

    return llama_folder(folder) if model == "llama" else samples.model_path(MODELS[model])


def llama_folder(folder: Path) -> Path:
    """A Llama-shaped model of 8 layers 512 wide with random weights, and the tokenizer of the decoder sample."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from luthier import samples

    tokenizer = AutoTokenizer.from_pretrained(samples.model_path(MODELS["decoder"]))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(sample: str, half: str = "train") -> list[dict[str, Any]]:
    """Labelled rows of a sample data set."""
    from luthier import samples

    path = samples.fetch(sample) / f"{half}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, some: list[dict[str, Any]]) -> Path:
    """Rows as a .jsonl file."""
    path.write_text("".join(json.dumps(r) + "\n" for r in some), encoding="utf-8")
    return path


def blocks(n: int, length: int, n_vocab: int, supervised: float) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (n, length) and labels: random words, of which the last `supervised` share carries loss."""
    made = np.random.default_rng(0)
    # The first ids are special tokens in most vocabularies; the frequent words follow them.
    ids = made.integers(1000, min(n_vocab, 20_000), size=(n, length))
    labels = ids.copy()
    labels[:, : length - round(supervised * length)] = -100
    return ids, labels


def measured(marks: list[float], sizes: list[tuple[int, int]], skip: int) -> dict[str, float]:
    """Rates of the steps after the first `skip`.

    Args:
        marks: times, one before the first step and one after each.
        sizes: (rows, tokens) of each step.
    """
    seconds = np.diff(np.asarray(marks))[skip:]
    counted = np.asarray(sizes, dtype=np.float64)[skip:]
    assert len(seconds) == len(counted) > 0, f"{len(seconds)} steps were timed and {len(counted)} counted"
    return {
        "steady_rows_per_second": float(counted[:, 0].sum() / seconds.sum()),
        "steady_tokens_per_second": float(counted[:, 1].sum() / seconds.sum()),
        "step_seconds": float(np.median(seconds)),
    }

"""The work that all contestants do: the same rows, the same numbers. No torch, no luthier at import."""

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "LLAMAS",
    "MODELS",
    "PROCESSOR",
    "blocks",
    "llama_folder",
    "measured",
    "model_folder",
    "now",
    "rows",
    "write_rows",
]

PROCESSOR = "LUTHIER_BENCHMARKS_PROCESSOR"
"""Set by `--processor`: steps are timed by the seconds that the processor spent on them."""
MODELS = {"encoder": "minilm-l6", "encoder_large": "mpnet-base", "decoder": "smollm2-135m"}


LLAMAS = {
    "llama": (512, 1408, 8, 8, 4),
    "llama-1b": (2048, 8192, 16, 32, 8),
    "llama-8b": (4096, 14336, 32, 32, 8),
}
"""Llama-shaped models with random weights: width, inner width, layers, heads, heads of keys and values"""


def model_folder(model: str, folder: Path) -> Path:
    """Where the model is: that of a sample, or a random one of LLAMAS, written to `folder`.

    Those of billions of numbers are written once, below luthier's cache: to make one takes longer than to measure it.
    """
    from luthier import samples

    if model not in LLAMAS:
        return samples.model_path(MODELS[model])
    if model == "llama":
        return llama_folder(model, folder)
    kept = samples.cache_dir() / "benchmarks" / model
    if not kept.is_dir():
        made = kept.with_name(f"{kept.name}.{os.getpid()}")
        llama_folder(model, made).rename(kept)
    return kept


def llama_folder(model: str, folder: Path) -> Path:
    """A model of LLAMAS, the large ones in bf16, and the tokenizer of the decoder sample."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from luthier import samples

    tokenizer = AutoTokenizer.from_pretrained(samples.model_path(MODELS["decoder"]))
    width, inner, layers, heads, key_heads = LLAMAS[model]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        made = LlamaForCausalLM(config)
    made.to(torch.bfloat16 if model != "llama" else torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def now() -> float:
    """Seconds by a steady clock, when all that was given to a GPU is done; of the processor where a job says so."""
    if os.environ.get(PROCESSOR):
        return time.process_time()
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


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

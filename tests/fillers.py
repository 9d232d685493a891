"""Tiny models that fill in words: an encoder whose tokenizer has a mask, and a T5 whose tokenizer has sentinels."""

from pathlib import Path

import torch
from little import little_model
from tiny import config_of
from tokenizers import processors
from transformers import AutoModelForMaskedLM
from word_tables import word_tokenizer

__all__ = ["encoder", "filler", "speller", "t5", "writer"]


def speller():
    """A word tokenizer with nine sentinels, which ends a text with its end token."""
    sentinels = [f"<extra_id_{i}>" for i in range(9)]
    tokenizer = word_tokenizer("gpt", bos_token=None, additional_special_tokens=sentinels)
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    return tokenizer


def encoder(folder: Path, kind: str = "bert", **changes) -> Path:
    """A tiny encoder in a folder, without a head of words."""
    found = little_model(folder, kind, **changes)
    word_tokenizer("bert", mask_token="[MASK]").save_pretrained(found)
    return found


def filler(folder: Path, kind: str = "bert", **changes) -> Path:
    """A tiny encoder with its head of words."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForMaskedLM.from_config(config_of(kind, **changes))
        model.save_pretrained(folder)
        word_tokenizer("bert", mask_token="[MASK]").save_pretrained(folder)
    return folder


def writer(folder: Path, **changes) -> Path:
    """A tiny decoder whose tokenizer puts nothing around a text."""
    return little_model(folder, "llama", **changes)


def t5(folder: Path, **changes) -> Path:
    """A tiny T5 in a folder."""
    found = little_model(folder, "t5", **changes)
    speller().save_pretrained(found)
    return found

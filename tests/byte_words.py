"""A tiny decoder with a byte-level vocabulary, as files of llama.cpp hold one."""

from pathlib import Path
from typing import Any

from little import little_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from word_tables import WORDS

__all__ = ["byte_model", "byte_tokenizer"]

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def byte_tokenizer(cut: Any = None) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges give each of WORDS one token.

    Args:
        cut: how texts are cut before words are merged; left out, each digit by itself, as "smollm" does.
    """
    inner = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.pre_tokenizer = cut or pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def byte_model(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A tiny model of 424 words, four more than its tokenizer has, as a folder on the disk."""
    little_model(folder, kind, vocab_size=424, **changes)
    byte_tokenizer().save_pretrained(folder)
    return folder

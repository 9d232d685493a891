"""A small word tokenizer and small tables, made on the spot."""

from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from luthier.data.rows import Table

WORDS = [
    "how",
    "far",
    "tall",
    "is",
    "it",
    "the",
    "moon",
    "sun",
    "what",
    "who",
    "when",
    "a",
    "an",
    "of",
    "cat",
    "dog",
    "good",
    "bad",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "hello",
    "world",
    "why",
    "because",
    "user",
    "assistant",
    "system",
    "answer",
    "question",
    "say",
    "name",
    "city",
    "paris",
    "rome",
]


def word_tokenizer(
    kind: str = "bert", *, words: tuple[str, ...] = tuple(WORDS), chat_template: str | None = None, **special: Any
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer. "bert": [CLS] text [SEP]; "gpt": nothing around the text; "bos": <s> before it."""
    if kind == "bert":
        names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        given = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names = ["<pad>", "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
        given = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        given["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]  # type: ignore[assignment]
    given |= special
    given = {k: v for k, v in given.items() if v is not None}
    vocabulary = {name: i for i, name in enumerate([*names, "\n", "!", ".", ",", "?", ":", *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=names[1]))
    inner.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names])
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Punctuation(),
        ]
    )
    if kind == "bert":
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    if kind == "bos":
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    types = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]} if kind == "bert" else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **given, **types, model_max_length=10**30
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def table(rows: list[dict[str, Any]], name: str = "rows.csv", first: int = 2) -> Table:
    """A table whose rows stand at lines `first`, `first + 1`, ... of the file `name`."""
    return Table(rows, [f"{name}:{first + i}" for i in range(len(rows))], name)

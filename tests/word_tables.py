"""A small word tokenizer and small tables, made on the spot."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
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


def byte_tokenizer(kind: str = "gpt2", **special: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a few words, whose blanks are written into the word that follows them.

    Args:
        kind: "gpt2", "gpt2-prefix" (`add_prefix_space`), "roberta" (<s> text </s>), "llama3" (a Split of its own).
    """
    blank = kind == "gpt2-prefix"
    inner = Tokenizer(models.BPE())
    if kind == "llama3":
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=blank)
    inner.decoder = decoders.ByteLevel()
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator([" ".join([*WORDS, "Hello world in Paris"])] * 4, trainer)
    if kind == "roberta":
        inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    given = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", **special}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, add_prefix_space=blank, **given,
        model_max_length=10**30,
    )  # fmt: skip

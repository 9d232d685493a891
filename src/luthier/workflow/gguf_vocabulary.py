"""A byte-level vocabulary in a GGUF file: written from a tokenizer, and made into one again.

llama.cpp holds the rules by which a text is cut before words are merged in its own code, and a file only names them
(`tokenizer.ggml.pre`). The name is found by behaviour: the tokenizer's own rules and those behind each name cut a text
that tells them apart, and the name whose pieces are the same is the one. Where none is, a file would read texts
otherwise, and nothing is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from luthier.core import CannotMerge, IntegrityError

__all__ = ["stops_of", "tokenizer_of", "write_vocabulary"]

NORMAL, UNKNOWN, CONTROL, USER, UNUSED = 1, 2, 3, 4, 5
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# What cuts differently by each rule: digits, capitals after an apostrophe, lines, signs, spaces, other letters.
PROBE = "It's 3, WE'LL see  12345 apples\n\n\tdon't--stop!!  \n naïve Ωmega 日本 3.14e10 (x_1) \r\n end   "


def cutters() -> dict[str, Any]:
    """llama.cpp's name -> the rules behind it, as the package tokenizers has them."""
    from tokenizers import Regex, pre_tokenizers

    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    bare = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {
        name: pre_tokenizers.Split(Regex(rule), "isolated") for name, rule in (("qwen2", QWEN2), ("llama-bpe", LLAMA3))
    }
    return {
        "gpt-2": plain,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]),
        **{name: pre_tokenizers.Sequence([cut, bare]) for name, cut in split.items()},
    }


def write_vocabulary(writer: Any, tokenizer: Any, n_vocab: int, stop: Sequence[int]) -> None:
    """Write a tokenizer into a file's metadata.

    Args:
        n_vocab: rows of the model's embedding; ids behind the tokenizer's words are named as unused.
        stop: ids that end an answer; llama.cpp knows two.

    Raises:
        CannotMerge: it is not a byte-level one that llama.cpp reads alike.
    """
    plain = _plain(tokenizer)
    model, pre = plain["model"], _name_of(tokenizer)
    words: dict[int, str] = {number: word for word, number in tokenizer.get_vocab().items()}
    if words and max(words) >= n_vocab:
        raise CannotMerge(
            f"the tokenizer has ids up to {max(words)}, and the model {n_vocab} rows. Nearest is --to merged."
        )
    added = {entry["id"]: entry["special"] for entry in plain["added_tokens"]}
    kinds = [
        UNUSED if i not in words else (CONTROL if added[i] else USER) if i in added else NORMAL for i in range(n_vocab)
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in range(n_vocab)])
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for name in ("bos", "unk", "pad"):
        number = getattr(tokenizer, f"{name}_token_id")
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    own = tokenizer.eos_token_id  # what templates write, so it is the first of those that end an answer
    ends = list(dict.fromkeys([*([] if own is None else [own]), *stop]))
    if len(ends) > 2:
        raise CannotMerge(
            f"{len(ends)} tokens end an answer, and a file of llama.cpp names two. Nearest is --to merged."
        )
    for number, add in zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
        add(number)
    before, behind = _around(tokenizer)
    writer.add_add_bos_token(before)
    writer.add_add_eos_token(behind)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _plain(tokenizer: Any) -> dict[str, Any]:
    inner = getattr(tokenizer, "backend_tokenizer", None)
    plain: dict[str, Any] = (
        json.loads(inner.to_str()) if inner is not None else {"model": {"type": type(tokenizer).__name__}}
    )
    if plain["model"].get("type") != "BPE" or plain["model"].get("byte_fallback"):
        kind = "BPE with bytes as words" if plain["model"].get("byte_fallback") else plain["model"].get("type")
        raise CannotMerge(
            f"its tokenizer is {kind}; byte-level BPE is written here. Nearest is --to merged, which llama.cpp's own "
            "converter reads."
        )
    return plain


def _name_of(tokenizer: Any) -> str:
    inner = tokenizer.backend_tokenizer
    normal = inner.normalizer
    # llama.cpp normalises nothing; of NFC, which Qwen has, only rare texts show.
    if normal is not None and normal.normalize_str("A naïve Text ") != "A naïve Text ":
        raise CannotMerge(
            "its tokenizer changes letters before it cuts a text, which llama.cpp does not. Nearest is --to merged."
        )
    if inner.pre_tokenizer is not None:
        wanted = inner.pre_tokenizer.pre_tokenize_str(PROBE)
        for name, cutter in cutters().items():
            if cutter.pre_tokenize_str(PROBE) == wanted:
                return name
    raise CannotMerge(
        f"its tokenizer cuts texts by none of the rules that are known here ({', '.join(cutters())}). Nearest is "
        "--to merged, which llama.cpp's own converter reads."
    )


def _around(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets the first token before it, and the last one behind."""
    ids = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    before, behind = bool(ids[:1] != bare[:1] and ids[0] == bos), bool(ids[-1:] != bare[-1:] and ids[-1] == eos)
    if ids != [bos] * before + bare + [eos] * behind:
        raise CannotMerge(
            "its tokenizer puts other tokens around a text than the first and the last one. Nearest is --to merged."
        )
    return before, behind


def stops_of(facts: Mapping[str, Any]) -> list[int]:
    """Ids that end an answer, by a file's metadata."""
    names = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return [int(facts[name]) for name in names if name in facts]


def tokenizer_of(facts: Mapping[str, Any]) -> Any:
    """The tokenizer that a file holds.

    Raises:
        IntegrityError: it holds none that can be read here.
    """
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import PreTrainedTokenizerFast

    named = "tokenizer.ggml."
    if facts.get(f"{named}model") != "gpt2" or facts.get(f"{named}pre") not in cutters():
        raise IntegrityError(
            f"its vocabulary is {facts.get(f'{named}model')!r}, cut by {facts.get(f'{named}pre')!r}: not read here"
        )
    words, kinds = facts[f"{named}tokens"], facts[f"{named}token_type"]
    numbers = {word: n for n, (word, kind) in enumerate(zip(words, kinds, strict=True)) if kind != UNUSED}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in facts[f"{named}merges"])]
    inner = Tokenizer(models.BPE(vocab=numbers, merges=merges))
    inner.pre_tokenizer = cutters()[facts[f"{named}pre"]]
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL])
    inner.add_tokens([word for word, kind in zip(words, kinds, strict=True) if kind == USER])
    special = {
        f"{ours}_token": words[facts[f"{named}{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if f"{named}{theirs}_token_id" in facts
    }
    ends = [
        name for name, wanted in (("bos", "add_bos_token"), ("eos", "add_eos_token")) if facts.get(f"{named}{wanted}")
    ]
    if ends:
        before, behind = (f"{special[f'{n}_token']}:0" if n in ends else "" for n in ("bos", "eos"))
        inner.post_processor = processors.TemplateProcessing(
            single=f"{before} $A:0 {behind}".split(), pair=f"{before} $A:0 {behind} $B:1".split(),
            special_tokens=[(special[f"{n}_token"], facts[f"{named}{n}_token_id"]) for n in ends],
        )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **special)
    tokenizer.chat_template = facts.get("tokenizer.chat_template")
    return tokenizer

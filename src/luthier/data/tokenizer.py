"""What is asked of a tokenizer: ids of many texts at once, a token for padding, and how long a row may be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core import ConfigError, DataError, ModelError
from luthier.core.fast_paths import fast
from luthier.data.rows import Table
from luthier.data.tasks import Task

__all__ = ["Pad", "check_ids", "check_tokenizer", "choose_length", "choose_pad", "position_limit", "tokenize"]

DEFAULT_LENGTH = dict.fromkeys(("causal_lm", "seq2seq", "preference", "judged", "reward", "prompts"), 1024)
OTHER_DEFAULT_LENGTH = 512

# Their position table has padding_idx + 1 rows that no token reaches: positions are counted from there.
COUNTS_FROM_PAD = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "mpnet"),
        *("longformer", "luke", "mluke", "data2vec-text", "ibert", "esm", "markuplm", "layoutlmv3"),
    }
)


@dataclass(frozen=True, kw_only=True)
class Pad:
    """The token that fills rows up. Never the end-of-sequence token: models must learn to end."""

    id: int
    token: str
    how: str


def choose_pad(tokenizer: Any, n_vocab: int) -> Pad:
    """Choose the padding token and give it to the tokenizer.

    The tokenizer's own, unless it has none or it is the end token; then a reserved special token, a free row of the
    embedding, or the last word of the vocabulary. Padding is masked in attention and loss, so its meaning is never
    read; what counts is that it is not the end token, whose loss would be masked with it.
    """
    eos = tokenizer.eos_token_id
    own = tokenizer.pad_token_id
    if own is not None and own != eos and own < n_vocab:
        return Pad(id=own, token=tokenizer.pad_token, how="the tokenizer's own")
    why = "the tokenizer has none" if own is None else f"the tokenizer's own, {tokenizer.pad_token!r}, is the end token"
    if own is not None and own != eos:
        why = f"the tokenizer's own has id {own}, beyond the {n_vocab} rows of the embedding"
    special = {t: tokenizer.convert_tokens_to_ids(t) for t in _special_tokens(tokenizer)}
    usable = {t: i for t, i in special.items() if i not in (eos, tokenizer.bos_token_id) and 0 <= i < n_vocab}
    if usable:
        # A token made for padding first, then the unknown token, then any reserved one.
        token = min(usable, key=lambda t: ("pad" not in t.lower(), t != tokenizer.unk_token, usable[t]))
        tokenizer.pad_token = token
        return Pad(id=usable[token], token=token, how=f"{why}; took the special token {token!r}")
    if len(tokenizer) < n_vocab:
        tokenizer.add_special_tokens({"pad_token": "<|luthier_pad|>"})
        return Pad(id=tokenizer.pad_token_id, token="<|luthier_pad|>", how=f"{why}; took a free row of the embedding")
    last = next(i for i in range(len(tokenizer) - 1, -1, -1) if i != eos)
    token = tokenizer.convert_ids_to_tokens(last)
    tokenizer.pad_token = token
    return Pad(id=last, token=token, how=f"{why}; took the last word of the vocabulary, {token!r}")


def _special_tokens(tokenizer: Any) -> list[str]:
    named = [str(t) for t in tokenizer.all_special_tokens]
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if getattr(t, "special", False)]
    return list(dict.fromkeys(named + added))


def check_tokenizer(tokenizer: Any, n_vocab: int) -> None:
    """Refuse a tokenizer that knows more tokens than the model has embeddings.

    Raises:
        ModelError: it does; both sizes are named.
    """
    if len(tokenizer) > n_vocab:
        last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens (the last is {last!r}), the model's embedding has {n_vocab}"
            " rows: they do not belong together. Load the tokenizer of this model, or resize its embedding first."
        )


def position_limit(model_config: Any) -> int | None:
    """Tokens that the model's position table has room for; `None` where positions are unlimited or unknown."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    if getattr(config, "model_type", "") in ("t5", "mt5", "umt5", "longt5", "bloom", "mpt", "switch_transformers"):
        return None  # relative positions: `n_positions` in their files limits nothing
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if getattr(config, "model_type", "") in COUNTS_FROM_PAD:
        limit -= (getattr(config, "pad_token_id", None) or 0) + 1
    return limit


def choose_length(
    asked: int | None, tokenizer: Any, model_config: Any, task: Task, reserved: int = 0, answers: int = 0
) -> int:
    """The longest example in tokens.

    Args:
        asked: `RunSpec.max_length`.
        reserved: positions that the method takes for itself (prompt tuning's tokens).
        answers: positions that are kept for what the model writes after an example.

    Raises:
        ConfigError: more than the model has positions for, or too little for one token of text.
    """
    limit = position_limit(model_config)
    if limit is not None:
        limit -= reserved + answers
        if answers and limit < 1:
            raise ConfigError(
                f"new_tokens is {answers}, but the model has {limit + answers} positions for prompt and answer. Lower "
                "new_tokens."
            )
    if asked is None:
        known = [n for n in (limit, tokenizer.model_max_length) if n is not None and n < 10**9]
        asked = min([*known, DEFAULT_LENGTH.get(task.name, OTHER_DEFAULT_LENGTH)])
    elif limit is not None and asked > limit:
        taken = f" ({reserved} of them taken by the method)" if reserved else ""
        taken += f" ({answers} of them for the answer)" if answers else ""
        raise ConfigError(
            f"max_length is {asked}, but the model has {limit + reserved + answers} positions{taken}:"
            f" at most {limit} are possible. Lower max_length, or leave it out."
        )
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if asked <= special:
        raise ConfigError(
            f"max_length is {asked}, but {special} tokens of each row are special ones: nothing of the text"
            f" would remain. Give at least {special + 1}; most texts need 64 or more."
        )
    return asked


def check_ids(lists: Sequence[Sequence[int]], rows: Sequence[int], table: Table, tokenizer: Any, n_vocab: int) -> None:
    """Refuse ids that the model's embedding has no row for.

    Raises:
        DataError: there is one; row, id and both sizes are named.
    """
    for ids, row in zip(lists, rows, strict=True):
        if ids and max(ids) >= n_vocab:
            wrong = max(ids)
            raise DataError(
                f"{table.places[row]}: token {tokenizer.convert_ids_to_tokens(wrong)!r} has id {wrong}, but the model's"
                f" embedding has {n_vocab} rows (the tokenizer has {len(tokenizer)} tokens). They do not belong"
                " together: load the tokenizer of this model."
            )


def tokenize(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any) -> Any:
    """Tokenise a batch of texts; the tokenizer's own threads share the work. Warnings about length are ours to give."""
    if not options and _is_usual(tokenizer):
        return _tokenize_fast(tokenizer, texts, pairs)
    more = {"text_pair": list(pairs)} if pairs is not None else {}
    return tokenizer(list(texts), **more, padding=False, verbose=False, return_attention_mask=False, **options)


def _is_usual(tokenizer: Any) -> bool:
    """Whether calling the tokenizer is nothing but a call of its compiled part."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase
    from transformers.tokenization_utils_tokenizers import TokenizersBackend

    kind = type(tokenizer)
    return (
        fast()
        and isinstance(tokenizer, TokenizersBackend)
        and kind.__call__ is PreTrainedTokenizerBase.__call__
        and kind._encode_plus is TokenizersBackend._encode_plus
        and kind._convert_encoding is TokenizersBackend._convert_encoding
        and not hasattr(tokenizer, "_switch_to_input_mode")
    )


def _tokenize_fast(tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None) -> dict[str, list[list[int]]]:
    """The same ids, without the characters that each token comes from, which take a third of the time to note."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    rows: Any = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
    found = backend.encode_batch_fast(rows, add_special_tokens=True)
    result = {"input_ids": [one.ids for one in found]}
    if "token_type_ids" in tokenizer.model_input_names:
        result["token_type_ids"] = [one.type_ids for one in found]
    return result

"""Rows become token ids; what happened to each row is written in a ledger.

Ids of all examples lie in one flat int32 array with offsets, so a million rows cost their ids and little more. An
example is what a batch holds; most rows are one example, a long plain text is several (`Examples.rows` says whose).
"""

import gc
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from luthier import kernels
from luthier.core import ConfigError, DataError, ModelError
from luthier.training.columns import Columns, cell
from luthier.training.rows import Table
from luthier.training.tasks import Task, words_and_tags

if TYPE_CHECKING:
    from luthier.training.chat import ChatTemplate

__all__ = ["IGNORED", "Examples", "Ledger", "Pad", "check_tokenizer", "choose_length", "choose_pad", "encode"]

IGNORED = -100
"""The label of a token that carries no loss; what torch's cross-entropy ignores."""

CHUNK = 2000
USED, TRUNCATED, REFUSED = "used", "truncated", "refused"
DEFAULT_LENGTH = {"causal_lm": 1024, "seq2seq": 1024}
OTHER_DEFAULT_LENGTH = 512

# Their position table has padding_idx + 1 rows that no token reaches: positions are counted from there.
COUNTS_FROM_PAD = frozenset(
    {
        *("roberta", "xlm-roberta", "xlm-roberta-xl", "roberta-prelayernorm", "camembert", "xmod", "mpnet"),
        *("longformer", "luke", "mluke", "data2vec-text", "ibert", "esm", "markuplm", "layoutlmv3"),
    }
)


class Ledger:
    """What became of each row: used, truncated or refused, and why."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._status = np.zeros(len(table), dtype=np.uint8)  # 0 not yet seen, 1 used, 2 truncated, 3 refused
        self._tokens = np.zeros(len(table), dtype=np.int64)
        self._targets = np.zeros(len(table), dtype=np.int64)
        self._reasons: dict[int, str] = {}
        self.notes: list[str] = []

    def use(self, row: int, tokens: int, targets: int) -> None:
        """The row goes into training whole. A row that gives several examples is told of each: the numbers add up."""
        self._status[row] = 2 if self._status[row] > 1 else 1
        self._tokens[row] += tokens
        self._targets[row] += targets

    def truncate(self, row: int, tokens: int, targets: int, reason: str) -> None:
        """A part of the row goes into training."""
        self.use(row, tokens, targets)
        self._status[row] = 2
        self._reasons[row] = reason

    def refuse(self, row: int, reason: str) -> None:
        """Nothing of the row goes into training, or nothing of one of its examples."""
        self._status[row] = 2 if self._status[row] in (1, 2) else 3
        self._reasons[row] = reason

    def taken(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], dict[int, str]]:
        """What has been written so far: status, tokens and targets of each row, and the reasons."""
        return self._status, self._tokens, self._targets, self._reasons

    def take(
        self, status: NDArray[np.uint8], tokens: NDArray[np.int64], targets: NDArray[np.int64], reasons: dict[int, str]
    ) -> None:
        """The inverse of `taken`, of a ledger of the same rows."""
        assert len(status) == len(tokens) == len(targets) == len(self._table)
        self._status, self._tokens, self._targets, self._reasons = status, tokens, targets, reasons

    def place(self, row: int) -> str:
        """Where a row stands, such as `questions.csv:12`."""
        return self._table.places[row]

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """One plain record for each row, in the order of the data: row, place, status, reason, tokens, targets."""
        names = ("", USED, TRUNCATED, REFUSED)
        for i in range(len(self._table)):
            yield {
                "row": i,
                "place": self._table.places[i],
                "status": names[self._status[i]],
                "reason": self._reasons.get(i, ""),
                "tokens": int(self._tokens[i]),
                "targets": int(self._targets[i]),
            }

    def lines(self, half: str) -> Iterator[bytes]:
        """The records as lines of JSON, each with the half of the data it is of: a million take a second or two."""
        quoted = json.encoder.encode_basestring
        names = [json.dumps(name) for name in ("", USED, TRUNCATED, REFUSED)]
        start, reasons = f'{{"half": {quoted(half)}, "row": ', self._reasons
        numbers = zip(
            self._table.places, self._status.tolist(), self._tokens.tolist(), self._targets.tolist(), strict=True
        )
        for i, (place, status, tokens, targets) in enumerate(numbers):
            why = quoted(reasons[i]) if i in reasons else '""'
            yield (
                f'{start}{i}, "place": {quoted(place)}, "status": {names[status]}, "reason": {why}, '
                f'"tokens": {tokens}, "targets": {targets}}}\n'
            ).encode()

    def counts(self) -> dict[str, int]:
        """Rows used, truncated and refused; tokens and targets of all of them."""
        n = np.bincount(self._status, minlength=4)
        return {
            "rows": len(self._table),
            USED: int(n[1]),
            TRUNCATED: int(n[2]),
            REFUSED: int(n[3]),
            "tokens": int(self._tokens.sum()),
            "targets": int(self._targets.sum()),
        }

    def sentence(self) -> str:
        """The counts in words, with the reasons, for the log."""
        n = self.counts()
        text = f"{self._table.source}: {n['rows']} rows: {n[USED]} used, {n[TRUNCATED]} truncated, {n[REFUSED]} refused"
        reasons = self._some_refused(3)
        return f"{text} ({reasons})" if reasons else text

    def check(self, accept_refused: float) -> None:
        """Stop when too many rows are unusable.

        Raises:
            DataError: no row is left, or more than the share `accept_refused` is refused; names reasons and places.
        """
        n = self.counts()
        if n[USED] + n[TRUNCATED] == 0:
            raise DataError(
                f"{self._table.source}: none of {n['rows']} rows can be used: {self._some_refused(10)}."
                " Correct the rows, or check that the columns are the right ones."
            )
        if n[REFUSED] > accept_refused * n["rows"]:
            raise DataError(
                f"{self._table.source}: {n[REFUSED]} of {n['rows']} rows cannot be used"
                f" ({n[REFUSED] / n['rows']:.1%}, accepted are {accept_refused:.1%}): {self._some_refused(10)}."
                f" Correct them, or accept more: data.accept_refused = {min(1.0, n[REFUSED] / n['rows'] + 0.01):.2f}."
            )

    def _some_refused(self, most: int) -> str:
        rows = np.flatnonzero(self._status == 3)
        shown = [f"{self._table.places[i]}: {self._reasons[int(i)]}" for i in rows[:most]]
        more = [f"and {len(rows) - most} more"] if len(rows) > most else []
        return "; ".join(shown + more)


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Encoded rows. All flat arrays are cut by `offsets`: example i has `ids[offsets[i]:offsets[i + 1]]`."""

    ids: NDArray[np.int32] = field(repr=False)
    offsets: NDArray[np.int64] = field(repr=False)
    rows: NDArray[np.int64] = field(repr=False)
    """row of the table that each example comes from; ascending"""
    n_targets: NDArray[np.int64] = field(repr=False)
    """numbers in the loss that each example gives: supervised tokens, or 1 for a labelled row"""
    types: NDArray[np.int8] | None = field(default=None, repr=False)
    """token types (0 and 1 of a pair), flat, where the tokenizer has them"""
    labels: NDArray[np.int32] | None = field(default=None, repr=False)
    """one label for each id, `IGNORED` where there is no loss, flat (causal_lm, token_classification)"""
    answers: NDArray[np.int32] | None = field(default=None, repr=False)
    """ids of the responses, flat, cut by `answer_offsets` (seq2seq)"""
    answer_offsets: NDArray[np.int64] | None = field(default=None, repr=False)
    targets: NDArray[Any] | None = field(default=None, repr=False)
    """one target for each example: int64 (n,), float32 (n,), or float32 (n, labels)"""
    ledger: Ledger = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, those of a seq2seq response included: what a batch is measured by."""
        n = np.diff(self.offsets)
        return n if self.answer_offsets is None else n + np.diff(self.answer_offsets)

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """`lengths[indices]`, in time that depends on the indices only."""
        n = self.offsets[indices + 1] - self.offsets[indices]
        if self.answer_offsets is None:
            return n
        return n + self.answer_offsets[indices + 1] - self.answer_offsets[indices]


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


def choose_length(asked: int | None, tokenizer: Any, model_config: Any, task: Task, reserved: int = 0) -> int:
    """The longest example in tokens.

    Args:
        asked: `RunSpec.max_length`.
        reserved: positions that the method takes for itself (prompt tuning's tokens).

    Raises:
        ConfigError: more than the model has positions for, or too little for one token of text.
    """
    limit = position_limit(model_config)
    if limit is not None:
        limit -= reserved
    if asked is None:
        known = [n for n in (limit, tokenizer.model_max_length) if n is not None and n < 10**9]
        asked = min([*known, DEFAULT_LENGTH.get(task.name, OTHER_DEFAULT_LENGTH)])
    elif limit is not None and asked > limit:
        taken = f" ({reserved} of them taken by the method)" if reserved else ""
        raise ConfigError(
            f"max_length is {asked}, but the model has {limit + reserved} positions{taken}:"
            f" at most {limit} are possible. Lower max_length, or leave it out."
        )
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if asked <= special:
        raise ConfigError(
            f"max_length is {asked}, but {special} tokens of each row are special ones: nothing of the text"
            f" would remain. Give at least {special + 1}; most texts need 64 or more."
        )
    return asked


def encode(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    *,
    n_vocab: int,
    max_length: int,
    accept_refused: float = 0.05,
    with_targets: bool = True,
    loss_on: str = "response",
    template: "ChatTemplate | None" = None,
) -> Examples:
    """Encode every row of a table.

    Args:
        tokenizer: the model's own, of transformers.
        n_vocab: rows of the model's input embedding.
        max_length: tokens of the longest example (`choose_length`).
        accept_refused: share of rows that may be unusable.
        with_targets: off for prediction, where rows have no labels; then every row must be usable.
        loss_on: `DataSpec.loss_on`.
        template: of chat and prompt-response rows, in place of the tokenizer's own.

    The result is kept on the disk and read from there the next time (`luthier.training.encoded`); notes in the ledger
    say so.

    Raises:
        DataError: too many rows are unusable, or an id lies outside the vocabulary.
        ModelError: the tokenizer does not fit the model.
    """
    # Imported here: it builds on this file's examples and ledger.
    from luthier.training import encoded

    check_tokenizer(tokenizer, n_vocab)
    options = {"n_vocab": n_vocab, "max_length": max_length, "with_targets": with_targets, "loss_on": loss_on}
    entry = encoded.entry_of(table, columns, task, tokenizer, template, **options)
    examples, said = encoded.read(entry, table) if entry is not None else (None, "")
    if examples is None:
        with _without_collection():
            examples = _encode_anew(
                table, columns, task, tokenizer, n_vocab, max_length, with_targets, loss_on, template
            )
        if entry is not None and len(examples):
            said = "; ".join(filter(None, [said, encoded.keep(entry, examples)]))
    if said:
        examples.ledger.notes.append(said)
    examples.ledger.check(accept_refused if with_targets else 0.0)
    return examples


@contextmanager
def _without_collection() -> Iterator[None]:
    """Leave the collector of cycles out: lists of ids have none, and looking through all rows at each new million of
    objects took as long as all the rest of the encoding.
    """
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def _encode_anew(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    with_targets: bool,
    loss_on: str,
    template: "ChatTemplate | None",
) -> Examples:
    ledger = Ledger(table)
    if task.name in ("causal_lm", "seq2seq"):
        # Imported here: it builds on this file's examples and ledger.
        from luthier.training.language import encode_language

        return encode_language(
            table,
            columns,
            tokenizer,
            n_vocab,
            max_length,
            ledger,
            both=task.name == "seq2seq",
            with_targets=with_targets,
            loss_on=loss_on,
            template=template,
        )
    if task.name == "token_classification":
        return _encode_tags(table, columns, task, tokenizer, n_vocab, max_length, ledger, with_targets)
    return _encode_texts(table, columns, task, tokenizer, n_vocab, max_length, ledger, with_targets)


# --- flat arrays ------------------------------------------------------------------------------------------------------


class Flat:
    """Gathers lists of whole numbers into one flat array and its offsets."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._parts: list[NDArray[Any]] = []
        self._lengths: list[int] = []

    def add(self, values: Sequence[int]) -> None:
        self._parts.append(np.asarray(values, dtype=self._dtype))
        self._lengths.append(len(values))

    def add_many(self, lists: Sequence[Sequence[int]]) -> None:
        total = sum(map(len, lists))
        self._parts.append(np.fromiter(itertools.chain.from_iterable(lists), dtype=self._dtype, count=total))
        self._lengths.extend(map(len, lists))

    def array(self) -> NDArray[Any]:
        return np.concatenate(self._parts) if self._parts else np.zeros(0, dtype=self._dtype)

    def offsets(self) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.asarray(self._lengths, dtype=np.int64))]).astype(np.int64)


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
        kernels.fast()
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


def text_complaint(value: Any, role: str) -> str | None:
    """Why a cell is no usable text, or nothing."""
    if value is None:
        return f"{role} is missing"
    if not isinstance(value, str):
        return f"{role} is {value!r} ({type(value).__name__}), not text"
    return None if value.strip() else f"{role} is empty"


# --- texts with one target each ---------------------------------------------------------------------------------------


def _encode_texts(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    ledger: Ledger,
    with_targets: bool,
) -> Examples:
    assert columns.text is not None
    ids, types, kept = Flat(np.int32), Flat(np.int8), []
    typed = "token_type_ids" in tokenizer.model_input_names
    for start in range(0, len(table), CHUNK):
        rows, texts, pairs = _usable_texts(table, columns, range(start, min(start + CHUNK, len(table))), ledger)
        if not rows:
            continue
        second = pairs if columns.pair else None
        encoded = tokenize(tokenizer, texts, second)
        lists, kinds = list(encoded["input_ids"]), list(encoded["token_type_ids"]) if typed else []
        full = [len(x) for x in lists]
        long = [i for i, n in enumerate(full) if n > max_length]
        if long:
            shorter = tokenize(
                tokenizer,
                [texts[i] for i in long],
                [pairs[i] for i in long] if second else None,
                truncation=True,
                max_length=max_length,
            )
            for i, new in zip(long, range(len(long)), strict=True):
                lists[i] = shorter["input_ids"][new]
                if typed:
                    kinds[i] = shorter["token_type_ids"][new]
        check_ids(lists, rows, table, tokenizer, n_vocab)
        empty = _without_text(lists, tokenizer)
        keep = [i for i in range(len(rows)) if i not in empty]
        for i, row in enumerate(rows):
            if i in empty:
                ledger.refuse(row, f"no token of the text {texts[i][:40]!r} remains")
            elif full[i] > len(lists[i]):
                ledger.truncate(row, len(lists[i]), int(with_targets), f"{full[i]} tokens, cut to {len(lists[i])}")
            else:
                ledger.use(row, len(lists[i]), int(with_targets))
        ids.add_many([lists[i] for i in keep])
        if typed:
            types.add_many([kinds[i] for i in keep])
        kept += [rows[i] for i in keep]
    chosen = np.asarray(kept, dtype=np.int64)
    targets = task.targets(table, columns) if with_targets else None
    return Examples(
        ids=ids.array(),
        offsets=ids.offsets(),
        rows=chosen,
        n_targets=np.full(len(chosen), int(with_targets), dtype=np.int64),
        types=types.array() if typed else None,
        targets=None if targets is None else targets[chosen],
        ledger=ledger,
    )


def _usable_texts(
    table: Table, columns: Columns, indices: Sequence[int], ledger: Ledger
) -> tuple[list[int], list[str], list[str]]:
    rows, texts, pairs = [], [], []
    for i in indices:
        assert columns.text is not None
        text = cell(table, i, columns.text)
        pair = cell(table, i, columns.pair) if columns.pair else ""
        complaint = text_complaint(text, f"field {columns.text!r}")
        if columns.pair:
            complaint = complaint or text_complaint(pair, f"field {columns.pair!r}")
        if complaint:
            ledger.refuse(i, complaint)
        else:
            rows.append(i)
            texts.append(text)
            pairs.append(pair)
    return rows, texts, pairs


def _without_text(lists: Sequence[Sequence[int]], tokenizer: Any) -> set[int]:
    """Examples that hold special tokens only, such as of a text of control characters."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    return {i for i, ids in enumerate(lists) if len(ids) < 8 and all(t in special for t in ids)}


# --- tags -------------------------------------------------------------------------------------------------------------


def _encode_tags(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    ledger: Ledger,
    with_targets: bool,
) -> Examples:
    """The first token of each word carries its tag, further tokens no loss. Without tags, the first carries 0."""
    if not tokenizer.is_fast:
        raise ModelError(
            "token_classification needs a tokenizer that knows which word a token comes from (a fast one);"
            f" {type(tokenizer).__name__} does not. Convert it, or choose another model."
        )
    number = {name: i for i, name in enumerate(task.labels)}
    flat, types, labels, kept, counts = Flat(np.int32), Flat(np.int8), Flat(np.int32), [], []
    typed = "token_type_ids" in tokenizer.model_input_names
    for i in range(len(table)):
        words, tags = words_and_tags(table, i, columns)
        if not words or not any(w.strip() for w in words):
            ledger.refuse(i, f"field {columns.tokens!r} has no words")
            continue
        encoded = tokenizer(
            words,
            is_split_into_words=True,
            truncation=True,
            max_length=max_length,
            return_overflowing_tokens=False,
            verbose=False,
        )
        ids, word_of = encoded["input_ids"], encoded.word_ids()
        check_ids([ids], [i], table, tokenizer, n_vocab)
        marks = [IGNORED] * len(ids)
        seen: set[int] = set()
        for position, word in enumerate(word_of):
            if word is not None and word not in seen:
                seen.add(word)
                marks[position] = number[tags[word]] if tags is not None else 0
        if not seen:
            ledger.refuse(i, "no word of it remains as a token")
            continue
        if len(seen) < len(words):
            ledger.truncate(i, len(ids), len(seen), f"{len(words)} words, tags of {len(seen)} remain")
        else:
            ledger.use(i, len(ids), len(seen))
        flat.add(ids)
        labels.add(marks)
        if typed:
            types.add(encoded["token_type_ids"])
        kept.append(i)
        counts.append(len(seen) if with_targets else 0)
    return Examples(
        ids=flat.array(),
        offsets=flat.offsets(),
        rows=np.asarray(kept, dtype=np.int64),
        n_targets=np.asarray(counts, dtype=np.int64),
        types=types.array() if typed else None,
        labels=labels.array(),
        ledger=ledger,
    )

"""Lists of words with one tag each become token ids.

The words are read as a text, with a blank between them: tokenizers that write the blank into the word's first token
(byte-level BPE: RoBERTa, GPT-2, Llama-3, Qwen) know `" world"` and `"world"` as different words, and given a list of
words they leave the blanks out.
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from luthier.core import DataError, ModelError
from luthier.data.columns import Columns
from luthier.data.examples import CHUNK, IGNORED, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tag_tasks import words_and_tags
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_ids

__all__ = ["encode_tags"]


def encode_tags(
    table: Table,
    columns: Columns,
    task: Task,
    tokenizer: Any,
    n_vocab: int,
    max_length: int,
    ledger: Ledger,
    with_targets: bool,
) -> Examples:
    """The first token of each word carries its tag, further tokens no loss.

    A row that is too long is cut in training. Without targets the words that did not fit are read in further windows,
    each an example, so that every word that has a token is answered; `Examples.words` says which words those are.
    """
    if not tokenizer.is_fast:
        raise ModelError(
            "token_classification needs a tokenizer that knows which word a token comes from (a fast one);"
            f" {type(tokenizer).__name__} does not. Convert it, or choose another model."
        )
    number = {name: i for i, name in enumerate(task.labels)}
    flat, types, labels, numbers = Flat(np.int32), Flat(np.int8), Flat(np.int32), Flat(np.int32)
    kept: list[int] = []
    counts: list[int] = []
    typed = "token_type_ids" in tokenizer.model_input_names
    for start in range(0, len(table), CHUNK):
        rows: list[int] = []
        words_of: list[list[str]] = []
        tags_of: list[list[str] | None] = []
        for i in range(start, min(start + CHUNK, len(table))):
            try:
                words, tags = words_and_tags(table, i, columns)
            except DataError as error:
                if with_targets:
                    raise
                ledger.refuse(i, str(error).removeprefix(f"{table.places[i]}: ").removesuffix("."))
                continue
            if not any(w.strip() for w in words):
                ledger.refuse(i, f"field {columns.tokens!r} has no words")
                continue
            rows.append(i)
            words_of.append(words)
            tags_of.append(tags)
        first = _windows(tokenizer, words_of, max_length)
        for i, words, tags, window in zip(rows, words_of, tags_of, first, strict=True):
            windows = [window]
            while not with_targets and windows[-1].seen and (begin := windows[-1].seen[-1] + 1) < len(words):
                windows += _windows(tokenizer, [words[begin:]], max_length, begin)
            if not windows[-1].seen:
                windows.pop()
            if not windows:
                ledger.refuse(i, "no word of it remains as a token")
                continue
            seen = sum(len(w.seen) for w in windows)
            n_ids = sum(len(w.ids) for w in windows)
            if seen < len(words):
                ledger.truncate(i, n_ids, seen, f"{len(words)} words, tags of {seen} remain")
            else:
                ledger.use(i, n_ids, seen)
            for each in windows:
                check_ids([each.ids], [i], table, tokenizer, n_vocab)
                flat.add(each.ids)
                marks, words_here = [IGNORED] * len(each.ids), [IGNORED] * len(each.ids)
                for position, word in zip(each.positions, each.seen, strict=True):
                    marks[position] = 0 if tags is None else number[tags[word]]
                    words_here[position] = word
                labels.add(marks)
                numbers.add(words_here)
                if typed:
                    types.add(each.types)
                kept.append(i)
                counts.append(len(each.seen) if with_targets else 0)
    return Examples(
        ids=flat.array(),
        offsets=flat.offsets(),
        rows=np.asarray(kept, dtype=np.int64),
        n_targets=np.asarray(counts, dtype=np.int64),
        types=types.array() if typed else None,
        labels=labels.array(),
        words=None if with_targets else numbers.array(),
        ledger=ledger,
    )


class _Window:
    """Ids, and the words whose first token is among them: `seen[k]` begins at `positions[k]`."""

    def __init__(self, ids: list[int], types: list[int], positions: list[int], seen: list[int]) -> None:
        self.ids, self.types, self.positions, self.seen = ids, types, positions, seen


def _windows(tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int, begin: int = 0) -> list[_Window]:
    """Each row as a text, up to `max_length` tokens. `begin` is the number of a row's first word."""
    if not rows:
        return []
    # A word of blanks alone has no token: in the text it would only widen the gap.
    said = [[n for n, word in enumerate(words) if word.strip()] for words in rows]
    texts = [" ".join(words[n] for n in numbers) for words, numbers in zip(rows, said, strict=True)]
    encoded = tokenizer(
        [text or " " for text in texts],
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        padding=False,
        verbose=False,
    )
    found = []
    typed = encoded.get("token_type_ids")
    for k, (words, numbers, text) in enumerate(zip(rows, said, texts, strict=True)):
        starts = list(accumulate((len(words[n]) + 1 for n in numbers[:-1]), initial=0))
        positions: list[int] = []
        seen: list[int] = []
        offsets, special = encoded["offset_mapping"][k], encoded["special_tokens_mask"][k]
        for position, ((a, b), added) in enumerate(zip(offsets, special, strict=True)):
            while a < b and text[a : a + 1] == " ":  # the blank is part of the token, or all of it
                a += 1
            if added or a >= b or not numbers:
                continue
            word = numbers[bisect_right(starts, a) - 1] + begin
            if not seen or word > seen[-1]:
                positions.append(position)
                seen.append(word)
        found.append(_Window(list(encoded["input_ids"][k]), list(typed[k]) if typed else [], positions, seen))
    return found

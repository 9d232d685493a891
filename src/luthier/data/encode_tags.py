"""Lists of words with one tag each become token ids."""

from dataclasses import replace
from typing import Any

import numpy as np

from luthier.core import ModelError
from luthier.data.columns import Columns
from luthier.data.examples import IGNORED, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task, words_and_tags
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
    """The first token of each word carries its tag, further tokens no loss. Without tags, the first carries 0."""
    if not tokenizer.is_fast:
        raise ModelError(
            "token_classification needs a tokenizer that knows which word a token comes from (a fast one);"
            f" {type(tokenizer).__name__} does not. Convert it, or choose another model."
        )
    # What is asked for need not be there; a file with the tags in it may be asked about all the same.
    read = columns if with_targets else replace(columns, tags=None)
    number = {name: i for i, name in enumerate(task.labels)}
    flat, types, labels, kept, counts = Flat(np.int32), Flat(np.int8), Flat(np.int32), [], []
    typed = "token_type_ids" in tokenizer.model_input_names
    for i in range(len(table)):
        words, tags = words_and_tags(table, i, read)
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

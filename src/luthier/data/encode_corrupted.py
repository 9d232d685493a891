"""Plain texts whose tokens are to be filled in again: kept whole here, and corrupted when a batch is made of them."""

from typing import Any

import numpy as np

from luthier.core import ConfigError
from luthier.data.columns import Columns, text_complaint
from luthier.data.corrupted import corruption_of
from luthier.data.examples import CHUNK, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_ids, tokenize

__all__ = ["encode_corrupted"]


def encode_corrupted(
    table: Table, columns: Columns, task: Task, tokenizer: Any, n_vocab: int, max_length: int, ledger: Ledger
) -> Examples:
    """Each text is one example, and a long one several, each with the special tokens of a text of its own.

    Raises:
        ModelError: the tokenizer has no mask token, or no sentinels.
        ConfigError: no word fits into the longest row.
    """
    assert columns.text is not None
    corruption = corruption_of(task, tokenizer, n_vocab, seed=0)
    assert corruption is not None, "a task that takes something out"
    typed = "token_type_ids" in tokenizer.model_input_names
    ids, rows, counts = Flat(np.int32), [], []
    for start in range(0, len(table), CHUNK):
        usable = []
        for row in range(start, min(start + CHUNK, len(table))):
            complaint = text_complaint(table.rows[row].get(columns.text), f"field {columns.text!r}")
            if complaint:
                ledger.refuse(row, complaint)
            else:
                usable.append(row)
        texts = [table.rows[row][columns.text] for row in usable]
        lists = tokenize(tokenizer, texts)["input_ids"] if texts else []
        check_ids(lists, usable, table, tokenizer, n_vocab)
        for row, text, whole in zip(usable, texts, lists, strict=True):
            for piece in _pieces(tokenizer, text, list(whole), max_length):
                n = corruption.targets(piece)
                if n == 0:
                    ledger.refuse(row, f"{len(piece)} tokens: nothing is left to tell what was taken out")
                    continue
                ids.add(piece)
                rows.append(row)
                counts.append(n)
                ledger.use(row, len(piece), n)
    flat = ids.array()
    return Examples(
        ids=flat,
        offsets=ids.offsets(),
        rows=np.asarray(rows, dtype=np.int64),
        n_targets=np.asarray(counts, dtype=np.int64),
        types=np.zeros(len(flat), dtype=np.int8) if typed and task.name == "masked_lm" else None,
        ledger=ledger,
    )


def _pieces(tokenizer: Any, text: str, whole: list[int], size: int) -> list[list[int]]:
    """The ids of a text, `whole`, in pieces of at most `size`, the special tokens around each included."""
    if len(whole) <= size:
        return [whole]
    bare = list(tokenize(tokenizer, [text], add_special_tokens=False)["input_ids"][0])
    first = next((i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare), 0)
    before, after = whole[:first], whole[first + len(bare) :]
    step = size - len(before) - len(after)
    if step < 1:
        raise ConfigError(
            f"max_length = {size}: of so few tokens {len(before) + len(after)} are what the tokenizer adds, and no "
            "word fits. Set --max-length higher."
        )
    return [[*before, *bare[at : at + step], *after] for at in range(0, len(bare), step)]

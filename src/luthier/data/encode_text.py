"""Texts and pairs of texts with one target each become token ids."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from luthier.data.columns import Columns, text_complaint
from luthier.data.examples import CHUNK, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_ids, tokenize

__all__ = ["encode_texts"]


def encode_texts(
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
    rows: list[int] = []
    texts: list[str] = []
    pairs: list[str] = []
    for i in indices:
        assert columns.text is not None
        text: Any = table.rows[i].get(columns.text)
        pair: Any = table.rows[i].get(columns.pair) if columns.pair else ""
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

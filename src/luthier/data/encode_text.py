"""Texts and pairs of texts with one target each become token ids; what is too long is cut, or read in windows."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.data.columns import Columns, text_complaint
from luthier.data.examples import CHUNK, Examples, Flat, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_ids, tokenize
from luthier.data.windows import windows

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
    windowed: bool,
) -> Examples:
    assert columns.text is not None
    ids, types, kept = Flat(np.int32), Flat(np.int8), []
    in_windows = [0, 0]  # rows, and their windows
    typed = "token_type_ids" in tokenizer.model_input_names
    for start in range(0, len(table), CHUNK):
        rows, texts, pairs = _usable_texts(table, columns, range(start, min(start + CHUNK, len(table))), ledger)
        if not rows:
            continue
        second = pairs if columns.pair else None
        encoded = tokenize(tokenizer, texts, second)
        full = [len(x) for x in encoded["input_ids"]]
        lists = [[one] for one in encoded["input_ids"]]  # what is read of each row: itself, or its windows
        kinds = [[one] for one in encoded["token_type_ids"]] if typed else []
        if long := [i for i, n in enumerate(full) if n > max_length]:
            those = [texts[i] for i in long], [pairs[i] for i in long] if second else None
            shorter = tokenize(tokenizer, *those, truncation=True, max_length=max_length)
            places = _windows(tokenizer, *those, max_length) if windowed else [[]] * len(long)
            for new, i in enumerate(long):
                for name, read in (("input_ids", lists), *([("token_type_ids", kinds)] if typed else [])):
                    whole = np.asarray(read[i][0])
                    read[i] = [whole[place].tolist() for place in places[new]] or [shorter[name][new]]
                in_windows[0] += bool(places[new])
                in_windows[1] += len(places[new])
        check_ids([[*chain.from_iterable(parts)] for parts in lists], rows, table, tokenizer, n_vocab)
        empty = _without_text([parts[0] for parts in lists], tokenizer)
        keep = [i for i in range(len(rows)) if i not in empty]
        for i, row in enumerate(rows):
            n_read = sum(map(len, lists[i]))
            if i in empty:
                ledger.refuse(row, f"no token of the text {texts[i][:40]!r} remains")
            elif full[i] > n_read:
                ledger.truncate(row, n_read, int(with_targets), f"{full[i]} tokens, cut to {n_read}")
            else:
                ledger.use(row, n_read, int(with_targets))
        ids.add_many([part for i in keep for part in lists[i]])
        if typed:
            types.add_many([part for i in keep for part in kinds[i]])
        kept += [rows[i] for i in keep for _ in lists[i]]
    if windowed and in_windows[0]:
        said = "{} rows of more than {} tokens are read in {} windows, whose answers are averaged"
        ledger.notes.append(said.format(in_windows[0], max_length, in_windows[1]))
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


def _windows(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> list[list[NDArray[np.int64]]]:
    """For each row the positions that its windows read; none where it has to be cut."""
    found = tokenizer(list(texts), list(pairs) if pairs is not None else None, padding=False, verbose=False)
    return [windows(found.sequence_ids(i), max_length) for i in range(len(texts))]


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

"""Rows of a prompt, an answer, and whether the answer is liked (judged)."""

from dataclasses import replace
from typing import Any

import numpy as np

from luthier.core import ConfigError
from luthier.data.chat import ChatTemplate
from luthier.data.columns import Columns, is_blank, label_name
from luthier.data.encode_language import encode_language
from luthier.data.examples import Examples, Ledger
from luthier.data.rows import Table

__all__ = ["encode_judged", "liked"]

_WORDS = {"true": 1.0, "1": 1.0, "yes": 1.0, "false": 0.0, "0": 0.0, "no": 0.0}


def liked(value: Any) -> float | None:
    """1 for an answer that is liked, 0 for one that is not, None where the cell says neither.

    >>> [liked(v) for v in (True, "False", 1, 0.0, "yes", "maybe", None)]
    [1.0, 0.0, 1.0, 0.0, 1.0, None, None]
    """
    return None if is_blank(value) else _WORDS.get(label_name(value).lower())


def encode_judged(
    table: Table, columns: Columns, tokenizer: Any, n_vocab: int, max_length: int, ledger: Ledger, loss_on: str,
    template: ChatTemplate | None,
) -> Examples:  # fmt: skip
    """Encode rows as prompts with responses, each with its mark; a row without one is refused.

    Raises:
        ConfigError: `loss_on` asks for more than the answers.
    """
    if loss_on != "response":
        raise ConfigError(
            f"data.loss_on: {loss_on}: what is judged is the answer, and the prompt says nothing. Leave it out."
        )
    assert columns.label is not None
    column = columns.label
    found = encode_language(
        table, replace(columns, shape="answered"), tokenizer, n_vocab, max_length, ledger, both=False,
        with_targets=True, loss_on=loss_on, template=template,
    )  # fmt: skip
    marks = [liked(table.rows[row].get(column)) for row in found.rows.tolist()]
    for row, mark in zip(found.rows.tolist(), marks, strict=True):
        if mark is None:
            value = table.rows[row].get(column)
            why = "is empty" if is_blank(value) else f"is {value!r}"
            ledger.refuse_whole(row, f"field {column!r} {why}; it must be true or false")
    kept = [k for k, mark in enumerate(marks) if mark is not None]
    parts = [slice(found.offsets[k], found.offsets[k + 1]) for k in kept]
    assert found.labels is not None
    lengths = [0, *(part.stop - part.start for part in parts)]
    return replace(
        found,
        ids=np.concatenate([found.ids[:0], *(found.ids[part] for part in parts)]),
        labels=np.concatenate([found.labels[:0], *(found.labels[part] for part in parts)]),
        offsets=np.cumsum(lengths, dtype=np.int64),
        rows=found.rows[kept],
        n_targets=np.ones(len(kept), dtype=np.int64),
        marks=np.asarray([marks[k] for k in kept], dtype=np.float32).reshape(-1, 1),
    )

"""Rows become token ids: the encoder of the task, or what the token cache holds of an earlier run."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from luthier.data import (
    chat,
    cloze,
    corrupted,
    encode_cloze,
    encode_corrupted,
    encode_judged,
    encode_language,
    encode_pairs,
    encode_tags,
    encode_text,
    label_cells,
    tag_tasks,
    tasks,
    token_cache,
    windows,
)  # fmt: skip
from luthier.data import columns as columns_file
from luthier.data import examples as examples_file
from luthier.data import tokenizer as tokenizer_file
from luthier.data.chat import ChatTemplate
from luthier.data.columns import Columns
from luthier.data.examples import Examples, Ledger
from luthier.data.rows import Table
from luthier.data.tasks import Task
from luthier.data.tokenizer import check_tokenizer
from luthier.trust import template as rendering

__all__ = ["encode"]

ENCODERS = (
    chat,
    columns_file,
    cloze,
    corrupted,
    encode_cloze,
    encode_corrupted,
    encode_judged,
    encode_language,
    encode_pairs,
    encode_tags,
    encode_text,
    examples_file,
    label_cells,
    tag_tasks,
    tasks,
    tokenizer_file,
    windows,
    rendering,
)
"""The files whose source decides what a row's ids are: with another text of theirs, the cache holds nothing."""


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
    long: str = "cut",
    template: ChatTemplate | None = None,
    check: bool = True,
) -> Examples:
    """Encode every row of a table: for training and evaluation, and for prediction up to the target.

    Args:
        tokenizer: the model's own, of transformers.
        n_vocab: rows of the model's input embedding.
        max_length: tokens of the longest example (`choose_length`).
        accept_refused: share of rows that may be unusable.
        with_targets: off for prediction, where rows have no labels, and none are read.
        loss_on: `DataSpec.loss_on`.
        long: "windows", to read rows with one target in windows where they are too long (`luthier.data.windows`).
        template: of chat and prompt-response rows, in place of the tokenizer's own.
        check: refuse a table with too many unusable rows; in prediction, with any. Off, the ledger says which they are.

    The result is kept on the disk and read from there the next time (`luthier.data.token_cache`); notes in the ledger
    say so.

    Raises:
        DataError: too many rows are unusable, or an id lies outside the vocabulary.
        ModelError: the tokenizer does not fit the model.
    """
    check_tokenizer(tokenizer, n_vocab)
    if not with_targets and task.name != "reward":  # which answers an answer with a number
        columns = columns.inputs()
    options = {"n_vocab": n_vocab, "max_length": max_length, "with_targets": with_targets, "loss_on": loss_on}
    options |= {"long": long}
    entry = token_cache.entry_of(table, columns, task, tokenizer, template, ENCODERS, **options)
    examples, said = token_cache.read(entry, table) if entry is not None else (None, "")
    if examples is None:
        with _without_collection():
            examples = _encode_anew(
                table, columns, task, tokenizer, n_vocab, max_length, with_targets, loss_on, long, template
            )
        if entry is not None and len(examples):
            said = "; ".join(filter(None, [said, token_cache.write(entry, examples)]))
    if said:
        examples.ledger.notes.append(said)
    if check and with_targets:
        examples.ledger.check(accept_refused)
    elif check:
        examples.ledger.refuse_any()
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
    long: str,
    template: ChatTemplate | None,
) -> Examples:
    ledger = Ledger(table)
    if task.name == "reward" or (task.name == "preference" and with_targets):
        return encode_pairs.encode_pairs(
            table, columns, tokenizer, n_vocab, max_length, ledger, loss_on, template, alone=not with_targets
        )
    if task.name == "judged" and with_targets:
        return encode_judged.encode_judged(table, columns, tokenizer, n_vocab, max_length, ledger, loss_on, template)
    if task.writes:
        return encode_language.encode_language(
            table,
            columns,
            tokenizer,
            n_vocab,
            max_length,
            ledger,
            both=task.name == "seq2seq",
            with_targets=with_targets and task.name != "prompts",
            loss_on=loss_on,
            template=template,
        )
    if task.template:
        return encode_cloze.encode_cloze(table, columns, task, tokenizer, n_vocab, max_length, ledger, with_targets)
    if task.filled_in:
        return encode_corrupted.encode_corrupted(table, columns, task, tokenizer, n_vocab, max_length, ledger)
    if task.name == "token_classification":
        return encode_tags.encode_tags(table, columns, task, tokenizer, n_vocab, max_length, ledger, with_targets)
    return encode_text.encode_texts(
        table, columns, task, tokenizer, n_vocab, max_length, ledger, with_targets, long == "windows"
    )

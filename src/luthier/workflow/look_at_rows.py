"""Rows as the model will see them, before anything is trained.

Statistics are of rows spread over the table, 2,000 at most, so that a large file answers at once; which is said.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from luthier.data.chat import ChatTemplate
from luthier.data.cloze import as_cloze
from luthier.data.columns import find_columns
from luthier.data.encode import encode
from luthier.data.examples import IGNORED, Examples
from luthier.data.infer_task import infer_task
from luthier.data.order import Order
from luthier.data.packing import cut
from luthier.data.rows import Table, load_rows
from luthier.data.stop_tokens import refuse_endless, taught_ends
from luthier.data.tasks import Task
from luthier.data.tokenizer import choose_length, choose_pad
from luthier.runs.spec import RunSpec
from luthier.workflow.known_models import known_model
from luthier.workflow.model_files import find_model

__all__ = ["LookedAt", "Piece", "ShownRow", "look_at"]

SAMPLED = 2000
BARS = 10
UNCUT = 100_000  # tokens of a row that is shown, at most: what is cut of it is shown too
Kind = Literal["loss", "read", "cut"]
_WEIGHED = ("preference", "judged")


@dataclass(frozen=True)
class Piece:
    """One token of a row."""

    text: str
    kind: Kind
    special: bool = False


@dataclass(frozen=True)
class ShownRow:
    """One row: where it stands, its tokens, and what its line in the ledger says."""

    place: str
    pieces: tuple[Piece, ...]
    status: str
    reason: str
    tokens: int
    targets: int
    wanted: str = ""


@dataclass(frozen=True, kw_only=True)
class LookedAt:
    """What is to be seen of rows.

    Attributes:
        rows: of the source; `sampled` of them were encoded.
        template: where the words of a chat come from and the SHA-256 of the template; empty where there is none.
        stop: the tokens that rows teach the model to end with, and `stopping`, the share of the rows that do.
        supervised: share of the tokens that carry loss.
        lengths: of the sampled examples, sorted.
        bars: (longest length, examples) of each bar of their histogram.
        full: share of the tokens in the batches of an epoch that are no padding.
    """

    model: str
    source: str
    task: str
    rows: int
    sampled: int
    template: tuple[str, str]
    stop: tuple[str, ...]
    stopping: float | None
    supervised: float | None
    max_length: int
    counts: dict[str, int]
    lengths: tuple[int, ...] = field(repr=False)
    bars: tuple[tuple[int, int], ...]
    full: float
    batch: int
    notes: tuple[str, ...]
    shown: tuple[ShownRow, ...] = field(repr=False)


def look_at(spec: RunSpec, rows: int = 5) -> LookedAt:
    """Read rows as a run of this spec would, and show some.

    Args:
        spec: of which model, data, task, batch and `max_length` are read.
        rows: how many are shown, spread over the table.

    Raises:
        DataError: rows or columns that cannot be used, or no row teaches the model to stop.
        ModelError: a model or tokenizer that cannot be used.
    """
    source = find_model(spec.model)
    data = spec.data
    table, test = load_rows(data.source, delimiter=data.delimiter, encoding=data.encoding)
    columns = find_columns(table, data, spec.task)
    config, tokenizer = known_model(source)
    task = infer_task(table, test, columns, spec.task, config)
    if data.template is not None:
        task = as_cloze(task, data.template, data.words, columns, tokenizer, config)
    max_length = choose_length(spec.max_length, tokenizer, config, task)
    n_vocab = int(config.get_text_config().vocab_size)
    pad = choose_pad(tokenizer, n_vocab)

    def encoded(some: Table, longest: int) -> Examples:
        return encode(
            some, columns, task, tokenizer, n_vocab=n_vocab, max_length=longest, loss_on=data.loss_on, check=False
        )

    sample = table.take(_spread(len(table), SAMPLED))
    examples = encoded(sample, max_length)
    counts = examples.ledger.counts()
    if not len(examples):
        examples.ledger.check(0.0)
    chat = task.of_turns and columns.shape != "plain"
    writes = task.writes
    ends = taught_ends(examples, tokenizer) if writes or chat else set()
    stopping = _stopping(examples, ends) if writes else None
    if chat and task.name != "prompts":
        refuse_endless(examples, ends, max_length)
    shown = sample.take(_spread(len(sample), rows))
    template = ChatTemplate.of(tokenizer) if chat else None
    of_tokens = task.writes or task.of_words or task.name == "token_classification"
    n_targets, n_tokens = int(examples.n_targets.sum()), int(examples.lengths.sum())
    if task.name in _WEIGHED and examples.labels is not None:  # an answer, or a pair of them, counts as one there
        n_targets = int((examples.labels != IGNORED).sum())
    lengths = np.sort(examples.lengths)
    return LookedAt(
        model=spec.model, source=table.source, task=task.name, rows=len(table), sampled=len(sample),
        template=("", "") if template is None else (template.origin, template.digest),
        stop=tuple(str(tokenizer.convert_ids_to_tokens(t)) for t in sorted(ends)) if writes else (), stopping=stopping,
        supervised=n_targets / n_tokens if of_tokens else None,
        max_length=max_length, counts=counts, lengths=tuple(lengths.tolist()), bars=_bars(lengths),
        full=_full(examples, spec), batch=spec.batch.size,
        notes=(
            *table.notes, columns.sentence(), *task.notes, f"padding token {pad.token!r}: {pad.how}",
            *examples.ledger.notes,
        ),
        shown=tuple(_shown(shown, task, columns.label, encoded(shown, max_length), encoded(shown, UNCUT), tokenizer)),
    )  # fmt: skip


def _spread(n: int, most: int) -> list[int]:
    return [int(i) for i in np.unique(np.linspace(0, n - 1, min(n, most)).astype(int))]


def _stopping(examples: Examples, ends: set[int]) -> float:
    """The share of examples whose targets end in a stop token."""
    kept = 0
    for i in range(len(examples)):
        told = [t for t in _targets(examples, i) if t != IGNORED]
        kept += bool(told) and told[-1] in ends
    return kept / max(1, len(examples))


def _targets(examples: Examples, index: int) -> list[int]:
    flat, offsets = examples.labels, examples.offsets
    if examples.answers is not None and examples.answer_offsets is not None:
        flat, offsets = examples.answers, examples.answer_offsets
    return [] if flat is None else flat[offsets[index] : offsets[index + 1]].tolist()


def _bars(lengths: Any) -> tuple[tuple[int, int], ...]:
    """Bars of equal width, in round numbers of tokens."""
    most = int(lengths[-1])
    width = max(1, -(-most // BARS))
    width = next(w for w in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 64, 100, 128, 200, 256, 512, width) if w >= width)
    edges = range(width, most + width, width)
    return tuple((edge, int(((lengths > edge - width) & (lengths <= edge)).sum())) for edge in edges)


def _full(examples: Examples, spec: RunSpec) -> float:
    """Real tokens among those of all batches of an epoch."""
    lengths = examples.lengths
    order = Order(lengths, spec.batch.size, spec.seed, spec.batch.group_by_length)
    padded = 0
    for step in range(order.steps_per_epoch):
        for piece in cut(order.rows(0, step), lengths, spec.batch.tokens, spec.batch.size, spec.batch.pad_to):
            padded += len(piece) * -(-int(lengths[piece].max()) // spec.batch.pad_to) * spec.batch.pad_to
    return float(sum(lengths[order.rows(0, s)].sum() for s in range(order.steps_per_epoch))) / max(1, padded)


def _shown(
    table: Table, task: Task, label: str | None, examples: Examples, uncut: Examples, tokenizer: Any
) -> Iterator[ShownRow]:
    first = {int(row): i for i, row in reversed(list(enumerate(examples.rows.tolist())))}
    whole = {int(row): i for i, row in reversed(list(enumerate(uncut.rows.tolist())))}
    for record in examples.ledger:
        row = record["row"]
        pieces: list[Piece] = []
        if row in first:
            pieces = _pieces(examples, first[row], tokenizer)
            if task.name == "reward":  # one number is learnt of all of it
                pieces = [replace(piece, kind="read") for piece in pieces]
            pieces += _missing(pieces, _pieces(uncut, whole[row], tokenizer) if row in whole else [])
        elif row in whole:
            pieces = [replace(piece, kind="cut") for piece in _pieces(uncut, whole[row], tokenizer)]
        targets = sum(piece.kind == "loss" for piece in pieces) if task.name in _WEIGHED else record["targets"]
        wanted = "" if label is None or task.of_words or task.writes else str(table.rows[row].get(label))
        yield ShownRow(
            record["place"], tuple(pieces), record["status"], record["reason"], record["tokens"], targets, wanted,
        )  # fmt: skip


def _pieces(examples: Examples, index: int, tokenizer: Any) -> list[Piece]:
    ids = examples.ids[examples.offsets[index] : examples.offsets[index + 1]].tolist()
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    if examples.answers is not None:
        labels = [IGNORED] * len(ids)
        answer = _targets(examples, index)
        ids, labels = [*ids, *answer], [*labels, *answer]
    elif examples.labels is not None:
        labels = examples.labels[examples.offsets[index] : examples.offsets[index + 1]].tolist()
    else:
        labels = [IGNORED] * len(ids)
    texts = _texts(ids, tokenizer)
    return [
        Piece(text, "read" if told == IGNORED else "loss", id_ in special)
        for id_, text, told in zip(ids, texts, labels, strict=True)
    ]


def _texts(ids: list[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text. A letter of several tokens stands at the last of them."""
    texts: list[str] = []
    done = 0  # tokens whose letters are whole
    for i in range(len(ids)):
        start = max(0, done - 8)  # enough before it for blanks that a token has only inside a text
        before, with_it = (
            tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for end in (done, i + 1)
        )
        if with_it.endswith("\ufffd") and i - done < 4 and i + 1 < len(ids):
            texts.append("")
            continue
        texts.append(with_it[len(before) :] if with_it.startswith(before) else tokenizer.decode([ids[i]]))
        done = i + 1
    return texts


def _missing(kept: list[Piece], whole: list[Piece]) -> list[Piece]:
    """The tokens of the whole row that were cut from its end."""
    if len(whole) <= len(kept):
        return []
    same = next((i for i, (a, b) in enumerate(zip(kept, whole, strict=False)) if a.text != b.text), len(kept))
    return [replace(piece, kind="cut") for piece in whole[same:] if not piece.special or piece.kind == "loss"]

"""Batches: examples side by side, padded; made in the order that `luthier.data.order` gives."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from luthier.core import DataError
from luthier.data.corrupted import Corruption
from luthier.data.examples import IGNORED, Examples
from luthier.data.order import Order
from luthier.data.packing import best_fit, cut, cut_packed, laid_in_lines, padded_tokens, positions_in_lines, width_of

__all__ = ["Batch", "Batches", "Collator", "EvalBatches", "cut", "in_order"]

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples side by side, padded to the longest."""

    inputs: dict[str, Tensor]
    """what the model is called with: input_ids, attention_mask, and token_type_ids or decoder_input_ids with
    decoder_attention_mask; (b, t). And row_task, where rows are of several tasks; (b,). Where several examples stand in
    a line: input_ids and position_ids alone, which begin anew with each example"""
    labels: Tensor | None
    """(b, t) int64 with IGNORED where there is no loss, or one target for each example: (b,) or (b, labels)"""
    rows: NDArray[np.int64] = field(repr=False)
    """the example that each line is; where several stand in a line, all of them, line by line"""
    n_targets: int
    """numbers in the loss"""
    n_tokens: int
    """tokens without padding"""
    marks: Tensor | None = None
    """numbers that come with each example, (b, k). Pairs have 2 b lines: the first answers, then the second"""

    @property
    def packed(self) -> bool:
        """Whether several examples may stand in a line: no pass over it may fill a cache."""
        return "position_ids" in self.inputs

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        inputs = {name: t.to(device, non_blocking=True) for name, t in self.inputs.items()}
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        marks = None if self.marks is None else self.marks.to(device, non_blocking=True)
        return replace(self, inputs=inputs, labels=labels, marks=marks)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of examples. A pure function of the examples' indices, and of the step where something is drawn.

    Args:
        pad_id: fills ids up; masked in attention and loss.
        pad_to: lengths are rounded up to a multiple of this.
        left: pad on the left, for generation.
        corruption: takes something out of the examples, for the model to fill in.
        decoder_ids: what the decoder reads in every row, where it answers with one word.
        decoder_start: first id of the decoder's input (seq2seq), which is the labels moved one to the right.
    """

    pad_id: int
    pad_to: int = 1
    left: bool = False
    decoder_start: int | None = None
    corruption: Corruption | None = None
    decoder_ids: tuple[int, ...] = ()

    def __call__(self, examples: Examples, indices: NDArray[np.int64], when: tuple[int, ...] = ()) -> Batch:
        """The batch of some examples.

        Args:
            when: epoch and step, which name what is drawn; nothing, and draws are those of rows that are scored.
        """
        if self.corruption is not None:
            batch = self._batch(self.corruption(examples, indices, when), np.arange(len(indices), dtype=np.int64))
            facts = {f"row_{name}": torch.from_numpy(numbers[indices]) for name, numbers in examples.facts.items()}
            return replace(batch, rows=indices, inputs=batch.inputs | facts)
        return self._batch(examples, indices)

    def packed(self, examples: Examples, indices: NDArray[np.int64]) -> Batch:
        """The batch of some examples of a language model, several in a line. See `luthier.data.packing`."""
        assert examples.labels is not None
        starts, lengths = examples.offsets[indices], examples.lengths_of(indices)
        width = width_of(lengths, self.pad_to)
        lines = best_fit(lengths, width)
        ids, labels = (
            torch.from_numpy(laid_in_lines(flat, starts, lengths, lines, width, fill))
            for flat, fill in ((examples.ids, self.pad_id), (examples.labels, IGNORED))
        )
        return Batch(
            inputs={"input_ids": ids, "position_ids": torch.from_numpy(positions_in_lines(lengths, lines, width))},
            labels=labels,
            rows=indices[[row for line in lines for row in line]],
            n_targets=int(examples.n_targets[indices].sum()),
            n_tokens=int(lengths.sum()),
        )

    def _pairs(self, examples: Examples, indices: NDArray[np.int64], middles: NDArray[np.int64]) -> Batch:
        """Both halves of each pair, padded alike: first answers (b), then second (b)."""
        starts = np.concatenate([examples.offsets[indices], middles[indices]])
        lengths = np.concatenate([middles[indices], examples.offsets[indices + 1]]) - starts
        ids, mask = self._lines(examples.ids, starts, lengths, self.pad_id)
        facts = {n: torch.from_numpy(numbers[indices]).repeat(2) for n, numbers in examples.facts.items()}
        assert examples.labels is not None
        return Batch(
            inputs={"input_ids": ids, "attention_mask": mask} | {f"row_{n}": fact for n, fact in facts.items()},
            labels=self._lines(examples.labels, starts, lengths, IGNORED)[0],
            rows=indices,
            n_targets=int(examples.n_targets[indices].sum()),
            n_tokens=int(lengths.sum()),
            marks=None if examples.marks is None else torch.from_numpy(examples.marks[indices]),
        )

    def _batch(self, examples: Examples, indices: NDArray[np.int64]) -> Batch:
        if examples.middles is not None:
            return self._pairs(examples, indices, examples.middles)
        ids, mask = self._lay(examples.ids, examples.offsets, indices, self.pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if examples.types is not None:
            inputs["token_type_ids"] = self._lay(examples.types, examples.offsets, indices, 0)[0]
        inputs |= {f"row_{name}": torch.from_numpy(numbers[indices]) for name, numbers in examples.facts.items()}
        labels: Tensor | None = None
        if examples.answers is not None:
            assert examples.answer_offsets is not None
            labels, real = self._lay(examples.answers, examples.answer_offsets, indices, IGNORED, left=False)
            if self.decoder_start is not None:
                inputs["decoder_input_ids"] = self._moved_right(labels)
                if not bool(real.all()):  # what is computed from a row as a whole must not see its padding
                    inputs["decoder_attention_mask"] = real
        elif examples.labels is not None:
            labels = self._lay(examples.labels, examples.offsets, indices, IGNORED)[0]
        elif examples.targets is not None:
            labels = torch.from_numpy(examples.targets[indices])
        if self.decoder_ids:
            inputs["decoder_input_ids"] = torch.tensor(self.decoder_ids).repeat(len(indices), 1)  # (b, 2)
        return Batch(
            inputs=inputs,
            labels=labels,
            rows=indices,
            n_targets=int(examples.n_targets[indices].sum()),
            n_tokens=int(examples.lengths_of(indices).sum()),
            marks=None if examples.marks is None else torch.from_numpy(examples.marks[indices]),
        )

    def _lay(
        self,
        flat: NDArray[Any],
        offsets: NDArray[np.int64],
        indices: NDArray[np.int64],
        fill: int,
        left: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Lay pieces of a flat array side by side: values (b, t) and a mask of the same shape, both int64."""
        starts = offsets[indices]
        return self._lines(flat, starts, offsets[indices + 1] - starts, fill, left)

    def _lines(
        self,
        flat: NDArray[Any],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        fill: int,
        left: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        width = max(1, -(-int(lengths.max(initial=0)) // self.pad_to) * self.pad_to)
        place = np.arange(width)[None, :]
        if self.left if left is None else left:
            place = place - (width - lengths)[:, None]
        real = (place >= 0) & (place < lengths[:, None])
        values = np.full(real.shape, fill, dtype=np.int64)
        values[real] = flat[(starts[:, None] + place)[real]]
        return torch.from_numpy(values), torch.from_numpy(real.astype(np.int64))

    def _moved_right(self, labels: Tensor) -> Tensor:
        assert self.decoder_start is not None
        moved = labels.new_full(labels.shape, self.decoder_start)
        moved[:, 1:] = labels[:, :-1]
        return moved.masked_fill(moved == IGNORED, self.pad_id)


class Batches:
    """The micro-batches of each optimiser step.

    Args:
        tokens: padded tokens of a micro-batch, at most; a longer example stands alone.
        accumulate: micro-batches of a step, at least (if it has so many examples).
        workers: threads that collate ahead; the batches are the same for any number.
        pack: put several examples in a line, in place of padding.
    """

    def __init__(
        self,
        examples: Examples,
        order: Order,
        collator: Collator,
        tokens: int,
        accumulate: int = 1,
        workers: int = 0,
        pack: bool = False,
    ) -> None:
        self.examples = examples
        self.order = order
        self.collator = collator
        self.tokens = tokens
        self.accumulate = accumulate
        self.workers = workers
        self.pack = pack
        self._lengths = examples.lengths
        _refuse_hidden_ends(examples, collator.pad_id)

    def n_targets(self, epoch: int, step: int) -> int:
        """Numbers in the loss of a whole step: what the sum of its losses is divided by, however it is cut."""
        return int(self.examples.n_targets[self.order.rows(epoch, step)].sum())

    def pieces(self, epoch: int, step: int, tokens: int | None = None) -> list[NDArray[np.int64]]:
        """Cut a step into micro-batches, longest examples first.

        Args:
            tokens: budget of padded tokens, in place of the usual one (after running out of memory).
        """
        rows = self.order.rows(epoch, step)
        return self._cut(rows, tokens, self.pack)

    def _cut(self, rows: NDArray[np.int64], tokens: int | None, packed: bool) -> list[NDArray[np.int64]]:
        most = -(-len(rows) // self.accumulate)
        into = cut_packed if packed else cut
        return into(rows, self._lengths, tokens or self.tokens, most, self.collator.pad_to)

    def batch(self, piece: NDArray[np.int64], when: tuple[int, ...] = ()) -> Batch:
        """One micro-batch of a step. Args: when: epoch and step, which name what is drawn."""
        return self.collator.packed(self.examples, piece) if self.pack else self.collator(self.examples, piece, when)

    def step(self, epoch: int, step: int, tokens: int | None = None) -> list[Batch]:
        """The micro-batches of one optimiser step."""
        return [self.batch(piece, (epoch, step)) for piece in self.pieces(epoch, step, tokens)]

    def from_step(self, start: int, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """(global step, its micro-batches) for every step from `start` up to `stop`, prepared ahead by the workers."""
        return ahead(lambda s: self.step(*self.order.at(s)), range(start, stop), self.workers)

    def longest(self) -> Batch:
        """The widest micro-batch that can occur: tried first, so that memory runs out before step 1 or not at all."""
        rows = np.argsort(-self._lengths, kind="stable")[: self.order.size].astype(np.int64)
        return self.batch(self._cut(rows, None, self.pack)[0])

    def padding(self, packed: bool, steps: int = 200) -> float:
        """The share of padding in the tokens of an epoch's steps, or of so many of them, spread over it."""
        n = self.order.steps_per_epoch
        real = held = 0
        for step in np.unique(np.linspace(0, n - 1, min(n, steps)).astype(int)).tolist():
            rows = self.order.rows(0, step)
            real += int(self._lengths[rows].sum())
            held += padded_tokens(self._cut(rows, None, packed), self._lengths, self.collator.pad_to, packed)
        return 1 - real / max(1, held)


def ahead(work: Callable[[int], T], items: Sequence[int], workers: int) -> Iterator[tuple[int, T]]:
    """(item, work(item)) in the order of the items; with workers, a few items are worked on ahead in threads."""
    if workers == 0:
        for item in items:
            yield item, work(item)
        return
    with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="luthier-batch") as pool:
        waiting: list[tuple[int, Future[T]]] = []
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > workers:
                    first, future = waiting.pop(0)
                    yield first, future.result()
            while waiting:
                first, future = waiting.pop(0)
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class EvalBatches:
    """Batches for evaluation and prediction: sorted by length, longest first; `in_order` puts results back."""

    def __init__(self, examples: Examples, collator: Collator, tokens: int, most: int = 256) -> None:
        self.examples = examples
        self.collator = collator
        self.most = most
        self.tokens = tokens
        _refuse_hidden_ends(examples, collator.pad_id)

    def pieces(self, tokens: int | None = None) -> list[NDArray[np.int64]]:
        """The examples of each batch."""
        everything = np.arange(len(self.examples), dtype=np.int64)
        return cut(everything, self.examples.lengths, tokens or self.tokens, self.most, self.collator.pad_to)

    def __iter__(self) -> Iterator[Batch]:
        for piece in self.pieces():
            yield self.collator(self.examples, piece)

    def __len__(self) -> int:
        return len(self.pieces())


def in_order(parts: Sequence[tuple[NDArray[np.int64], Sequence[T]]]) -> list[T]:
    """Results of batches, put into the order of the examples.

    Args:
        parts: (`Batch.rows`, one result for each of them), together every example once.

    >>> in_order([(np.array([2, 0]), ["c", "a"]), (np.array([1]), ["b"])])
    ['a', 'b', 'c']
    """
    rows = np.concatenate([rows for rows, _ in parts]) if parts else np.zeros(0, dtype=np.int64)
    results = [result for _, values in parts for result in values]
    assert len(rows) == len(results), f"{len(rows)} rows but {len(results)} results"
    assert np.array_equal(np.sort(rows), np.arange(len(rows))), "a row is missing or stands twice"
    ordered = [results[i] for i in np.argsort(rows, kind="stable")]
    return ordered


def _refuse_hidden_ends(examples: Examples, pad_id: int) -> None:
    """Decoders with a classification head look for the last token that is not padding; a row may not end in that id.

    Raises:
        DataError: a labelled row ends in the padding token.
    """
    if examples.targets is None or len(examples) == 0:
        return
    ends = examples.ids[examples.offsets[1:] - 1]
    wrong = np.flatnonzero(ends == pad_id)
    if len(wrong):
        row = int(examples.rows[wrong[0]])
        raise DataError(
            f"{examples.ledger.place(row)}: the text ends in token {pad_id}, which stands for padding, so a"
            " classification head would not see its end. Remove it from the text, or give the tokenizer another"
            " padding token."
        )

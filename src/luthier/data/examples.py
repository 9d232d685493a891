"""Encoded rows: ids, offsets and targets in flat arrays, and a ledger that says what happened to each row.

Ids of all examples lie in one flat int32 array with offsets, so a million rows cost their ids and little more. An
example is what a batch holds; most rows are one example, a long plain text is several (`Examples.rows` says whose).
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from luthier.core import DataError
from luthier.data.rows import Table

__all__ = ["CHUNK", "IGNORED", "REFUSED", "TRUNCATED", "USED", "Examples", "Flat", "Ledger"]

IGNORED = -100
"""The label of a token that carries no loss; what torch's cross-entropy ignores."""

CHUNK = 2000
"""Rows that are encoded at a time."""

USED, TRUNCATED, REFUSED = "used", "truncated", "refused"


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

    def refuse_whole(self, row: int, reason: str) -> None:
        """Nothing of the row goes into training, whatever was said of it before."""
        self._status[row], self._tokens[row], self._targets[row] = 3, 0, 0
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

    @property
    def table(self) -> Table:
        """The rows that it is of."""
        return self._table

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

    def sentence(self, half: str = "") -> str:
        """The counts in words, with the reasons, for the log; `half` says of which half of the data they are."""
        n = self.counts()
        of = f"{self._table.source}, {half}" if half else self._table.source
        text = f"{of}: {n['rows']} rows: {n[USED]} used, {n[TRUNCATED]} truncated, {n[REFUSED]} refused"
        reasons = self._some_refused(3)
        return f"{text} ({reasons})" if reasons else text

    def refuse_any(self) -> None:
        """Stop when one row is unusable.

        Raises:
            DataError: there is one; names reasons and places.
        """
        n = self.counts()
        if n[REFUSED]:
            raise DataError(
                f"{self._table.source}: {n[REFUSED]} of {n['rows']} rows cannot be answered: {self._some_refused(10)}."
                " Correct them, or leave strict out: then each row gets its answer or its reason."
            )

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
                f" Correct them, or go on without them: --skip-bad (in Python, accept_refused of DataSpec)."
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
    words: NDArray[np.int32] | None = field(default=None, repr=False)
    """the number in its row of the word that each id begins, `IGNORED` elsewhere, flat (tags to predict)"""
    answers: NDArray[np.int32] | None = field(default=None, repr=False)
    """ids of the responses, flat, cut by `answer_offsets` (seq2seq)"""
    answer_offsets: NDArray[np.int64] | None = field(default=None, repr=False)
    targets: NDArray[Any] | None = field(default=None, repr=False)
    """one target for each example: int64 (n,), float32 (n,), or float32 (n, labels)"""
    middles: NDArray[np.int64] | None = field(default=None, repr=False)
    """where in `ids` the second answer of each example begins, prompt and all; the first comes before (pairs)"""
    marks: NDArray[np.float32] | None = field(default=None, repr=False)
    """numbers that come with each pair, (n, 2): the share of judges who found the first better, and by how much; or
    with a single answer, (n, 1): 1 where it is liked"""
    facts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict, repr=False)
    """whole numbers that say something of each example's row, by name: its task"""
    ledger: Ledger = field(repr=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The first example of each row that could be read: most rows have one, a long one may have several."""
        return np.flatnonzero(np.diff(self.rows, prepend=-1))

    @property
    def read_rows(self) -> NDArray[np.int64]:
        """The rows that could be read; ascending, each once."""
        return self.rows[self.firsts]

    @property
    def row_targets(self) -> NDArray[Any]:
        """The target of each of `read_rows`; of rows that have one."""
        assert self.targets is not None
        return self.targets[self.firsts]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example, those of a seq2seq response included: what a batch is measured by.

        Of a pair, twice its longer half, since both are padded to it.
        """
        if self.middles is not None:
            return self.lengths_of(np.arange(len(self), dtype=np.int64))
        n = np.diff(self.offsets)
        return n if self.answer_offsets is None else n + np.diff(self.answer_offsets)

    def lengths_of(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """`lengths[indices]`, in time that depends on the indices only."""
        if self.middles is not None:
            first = self.middles[indices] - self.offsets[indices]
            second = self.offsets[indices + 1] - self.middles[indices]
            return np.asarray(2 * np.maximum(first, second), dtype=np.int64)
        n = self.offsets[indices + 1] - self.offsets[indices]
        if self.answer_offsets is None:
            return n
        return n + self.answer_offsets[indices + 1] - self.answer_offsets[indices]


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

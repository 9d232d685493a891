"""Rows that teach a model to fill in what was taken out of them: words of an encoder's text, spans of T5's.

What is taken out of a row is drawn when a batch is made, and named by the step and the row: each epoch draws anew, and
neither a resumed run nor the way a step is cut changes a draw. Rows that are scored are named by themselves alone, so
every evaluation, and every run on the same rows, fills in the same.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.core import ModelError, key
from luthier.data.examples import IGNORED, Examples, Flat
from luthier.data.tasks import Task

__all__ = ["MASKED_SHARE", "MEAN_SPAN", "Corruption", "LostSpans", "MaskedWords", "corruption_of", "lost_of"]

MASKED_SHARE = 0.15
"""Share of a text's tokens that are taken out: BERT's, and T5's."""
MEAN_SPAN = 3.0
"""Tokens of a span that T5 loses, in the mean."""
HIDDEN, SWAPPED = 0.8, 0.1  # of the tokens taken out: become the mask, become any word; the others stay

Ids = NDArray[np.int32]


def lost_of(n_tokens: int) -> int:
    """Tokens that are taken out of a text of so many: a number, not a chance, so that a step's targets are known."""
    return max(1, round(MASKED_SHARE * n_tokens))


def spans_of(n_lost: int) -> int:
    """Spans that so many lost tokens make."""
    return max(1, round(n_lost / MEAN_SPAN))


class Corruption(Protocol):
    """Takes something out of examples."""

    def __call__(self, examples: Examples, indices: NDArray[np.int64], when: tuple[int, ...]) -> Examples:
        """These examples alone, as the model sees them, with what it is to fill in.

        Args:
            when: what names the draw beside the example: epoch and step, or nothing where rows are scored.
        """
        ...

    def targets(self, ids: Sequence[int]) -> int:
        """Numbers in the loss that an example of these ids gives; 0 where nothing can be taken out of it."""
        ...


class Draw:
    """Numbers of a name, from the raw words of a bit generator, whose stream numpy promises to keep."""

    def __init__(self, *name: int | str) -> None:
        self._words = np.random.Philox(key(*name))

    def shares(self, n: int) -> NDArray[np.float64]:
        """`n` numbers from 0 to 1."""
        return np.asarray((self._words.random_raw(n) >> np.uint64(11)) * 2.0**-53, dtype=np.float64)

    def of(self, n: int, count: int) -> NDArray[np.int64]:
        """`count` whole numbers below `n`."""
        return (self.shares(count) * n).astype(np.int64)

    def some(self, n: int, count: int) -> NDArray[np.int64]:
        """`count` different whole numbers below `n`."""
        return np.argsort(self.shares(n), kind="stable")[:count]


def _draw(seed: int, when: tuple[int, ...], example: int) -> Draw:
    return Draw(seed, "corrupted", *when, example) if when else Draw("scored", example)


@dataclass(frozen=True, kw_only=True)
class MaskedWords:
    """BERT's masked words: of those taken out, 8 of 10 become the mask, 1 any word, and 1 stays as it is.

    Args:
        special: (words,), whether a token is no word: never taken out, never put in.
    """

    mask: int
    special: NDArray[np.bool_] = field(repr=False)
    seed: int = 0

    def targets(self, ids: Sequence[int]) -> int:
        n = int((~self.special[np.asarray(ids, dtype=np.int64)]).sum())
        return lost_of(n) if n > 1 else 0  # one word alone: nothing would tell it

    def __call__(self, examples: Examples, indices: NDArray[np.int64], when: tuple[int, ...]) -> Examples:
        ids, labels, types = Flat(np.int32), Flat(np.int32), Flat(np.int8)
        words = np.flatnonzero(~self.special)
        for example in indices.tolist():
            piece = slice(int(examples.offsets[example]), int(examples.offsets[example + 1]))
            seen, wanted = self.of_row(examples.ids[piece], words, _draw(self.seed, when, example))
            ids.add(seen)  # type: ignore[arg-type]  # an array is a sequence here
            labels.add(wanted)  # type: ignore[arg-type]
            if examples.types is not None:
                types.add(examples.types[piece])  # type: ignore[arg-type]
        return Examples(
            ids=ids.array(), offsets=ids.offsets(), rows=indices, n_targets=examples.n_targets[indices],
            types=types.array() if examples.types is not None else None, labels=labels.array(), ledger=examples.ledger,
        )  # fmt: skip

    def of_row(self, ids: Ids, words: NDArray[np.int64], draw: Draw) -> tuple[Ids, Ids]:
        """What is seen and what is wanted of one row, both (tokens,)."""
        open_to = np.flatnonzero(~self.special[ids])
        taken = open_to[draw.some(len(open_to), lost_of(len(open_to)))]
        fate, other = draw.shares(len(taken)), words[draw.of(len(words), len(taken))]
        seen, wanted = ids.copy(), np.full(len(ids), IGNORED, dtype=np.int32)
        wanted[taken] = ids[taken]
        seen[taken] = np.where(fate < HIDDEN, self.mask, np.where(fate < HIDDEN + SWAPPED, other, ids[taken]))
        return seen, wanted


@dataclass(frozen=True, kw_only=True)
class LostSpans:
    """T5's lost spans: each leaves a sentinel in the text, and the decoder writes sentinels and spans in turn.

    Thank you <X> me to your party <Y>.   ->   <X> for inviting <Y> last week <Z>

    Args:
        sentinels: their ids, in the order of use.
        end: id of the end token, or None; it stays where it is in the text, and ends the answer.
    """

    sentinels: tuple[int, ...]
    end: int | None
    seed: int = 0

    def _text(self, ids: Ids) -> Ids:
        return ids[:-1] if self.end is not None and len(ids) and ids[-1] == self.end else ids

    def targets(self, ids: Sequence[int]) -> int:
        n = len(self._text(np.asarray(ids, dtype=np.int32)))
        if n < 2:
            return 0
        lost, spans = self._sizes(n)
        return lost + spans + 1 + (self.end is not None)

    def _sizes(self, n_tokens: int) -> tuple[int, int]:
        """Tokens lost and spans that they make; something stays between two spans, and a sentinel is left to end."""
        lost = min(lost_of(n_tokens), n_tokens - 1)
        return lost, min(spans_of(lost), n_tokens - lost + 1, len(self.sentinels) - 1)

    def __call__(self, examples: Examples, indices: NDArray[np.int64], when: tuple[int, ...]) -> Examples:
        ids, answers = Flat(np.int32), Flat(np.int32)
        for example in indices.tolist():
            row = examples.ids[int(examples.offsets[example]) : int(examples.offsets[example + 1])]
            seen, wanted = self.of_row(row, _draw(self.seed, when, example))
            ids.add(seen)
            answers.add(wanted)
        return Examples(
            ids=ids.array(), offsets=ids.offsets(), rows=indices, n_targets=examples.n_targets[indices],
            answers=answers.array(), answer_offsets=answers.offsets(), ledger=examples.ledger,
        )  # fmt: skip

    def of_row(self, ids: Ids, draw: Draw) -> tuple[list[int], list[int]]:
        """The text with sentinels, and the answer."""
        text = self._text(ids)
        lost, spans = self._sizes(len(text))
        lengths = _parts(lost, spans, draw)
        # What stays stands before, between and after the spans; between two of them is one token at least.
        gaps = _parts(len(text) - lost + 2, spans + 1, draw)
        gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
        seen: list[int] = []
        wanted: list[int] = []
        at = 0
        for sentinel, gap, length in zip(self.sentinels, gaps, lengths, strict=False):
            seen += [*text[at : at + gap].tolist(), sentinel]
            wanted += [sentinel, *text[at + gap : at + gap + length].tolist()]
            at += gap + length
        ends = ids[len(text) :].tolist()
        return [*seen, *text[at:].tolist(), *ends], [*wanted, self.sentinels[spans], *self._end()]

    def _end(self) -> list[int]:
        return [] if self.end is None else [self.end]


def _parts(whole: int, count: int, draw: Draw) -> list[int]:
    """`whole` cut into `count` parts of at least one, every way as likely as any other."""
    cuts = np.sort(draw.some(whole - 1, count - 1)) + 1
    edges = [0, *cuts.tolist(), whole]
    return [b - a for a, b in itertools.pairwise(edges)]


def corruption_of(task: Task, tokenizer: Any, n_vocab: int, seed: int) -> Corruption | None:
    """What the task takes out of its rows; None where it takes nothing.

    Raises:
        ModelError: the tokenizer has no token to put in its place.
    """
    if task.name == "masked_lm":
        if tokenizer.mask_token_id is None:
            raise ModelError(
                "task masked_lm needs a tokenizer with a mask token, and this model's has none. Use the model's own "
                "tokenizer, or --task causal_lm with a decoder."
            )
        special = np.ones(n_vocab, dtype=np.bool_)
        special[: len(tokenizer)] = False
        special[[i for i in tokenizer.all_special_ids if i < n_vocab]] = True
        return MaskedWords(mask=int(tokenizer.mask_token_id), special=special, seed=seed)
    if task.name == "span_corruption":
        known = tokenizer.get_vocab()
        found: list[int] = []
        while (at := known.get(f"<extra_id_{len(found)}>")) is not None and at < n_vocab:
            found.append(int(at))
        if len(found) < 2:
            raise ModelError(
                "task span_corruption needs a tokenizer with sentinels (<extra_id_0>, <extra_id_1>), as T5 has, and "
                "this model's has none. Use a T5, or --task seq2seq with prompt and response columns."
            )
        return LostSpans(sentinels=tuple(found), end=tokenizer.eos_token_id, seed=seed)
    return None

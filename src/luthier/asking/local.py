"""A model of ours that answers requests: scores of options, and text, with what prompts share computed once.

    prompt 1   [ shared by all prompts ][ own 1 ] option a
    prompt 2   [ shared by all prompts ][ own 2 ] option a

Keys and values of the shared part are computed once and laid before each row. Rows that are scored are padded behind
their last token, where no token of theirs looks: neither batch nor padding changes a score. Whether the model takes a
shared part so is tried with the first: where logits differ from those without it, nothing is shared.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from math import isnan
from typing import Any

import torch
from torch import Tensor

from luthier.asking.machine import Cost
from luthier.asking.way import Score, Scored, Text, Write
from luthier.asking.writing import apart, written
from luthier.core import DataError, ModelError
from luthier.data.chat import Chat, ChatTemplate
from luthier.training.precision import Precision
from luthier.workflow.controls import own_changes, own_words
from luthier.workflow.load_model import quiet

__all__ = ["Local"]

Ids = list[int]
LEAST_SHARED = 16
"""Tokens that must be shared: below, a pass of its own costs more than it spares."""
ROUNDING, ROUNDING_IN_HALVES = 1e-3, 3e-2
"""What sharing may change in logits, as a share of their spread."""
KEPT = 2
"""Shared parts whose keys and values are kept."""
ROWS = 32


@dataclass
class _Row:
    """One pass: a prompt and the beginning of an option. `told` holds (place in the tail, token) -> log-probability."""

    request: int
    prompt: str
    context: Ids
    tail: tuple[int, ...]
    told: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def ids(self) -> Ids:
        return [*self.context, *self.tail]


class Local:
    """See the top of this file.

    Args:
        both: an encoder-decoder: prompts go into the encoder, options and texts into the decoder.
        stop: ids that end a text.
        within: a context in which the model answers, such as `Tuned.serving`.
        tokens: padded tokens of a batch, at most.
        share: compute what prompts share once, where the model takes it.
        template: of a chat model: each prompt is one turn of the user, and the assistant's turn goes on from it. None
            gives prompts as they are.
    """

    scores, writes = True, True
    wave = 64

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, device: torch.device, precision: Precision, both: bool,
        limit: int | None, pad_id: int, stop: Sequence[int],
        within: Callable[[], AbstractContextManager[Any]] = nullcontext, tokens: int = 4096, share: bool = True,
        template: ChatTemplate | None = None,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.device, self.precision, self.both, self.limit = device, precision, both, limit
        self.pad_id, self.stop, self.within = pad_id, tuple(stop), within
        self.tokens = max(1, min(tokens, 2**27 // int(model.get_input_embeddings().weight.shape[0])))
        self.share: bool | None = None if share and not both else False  # None until it was tried
        self.pads: bool | None = None  # the same of padding between a prompt and what is written after it
        self.cost = Cost()
        self._kept: dict[tuple[int, ...], Any] = {}
        self._counts: dict[str, int] = {}
        self.template = template
        self._chat: Chat | None = None
        self.own = own_changes(model)
        self._turns: dict[str, Ids] = {}

    # ------------------------------------------------------------------ tokens

    def count(self, text: str) -> int:
        """Tokens of a text, with those that the tokenizer puts around it."""
        if text not in self._counts:
            self._counts[text] = len(self.ids(text))
        return self._counts[text]

    def size(self, text: str) -> int:
        """Tokens of a text that goes on from a prompt: no turn is laid around it."""
        return self.count(text) if self.template is None else len(self._bare(text.strip()))

    def forget(self) -> None:
        self._kept.clear()
        self._counts.clear()
        self._turns.clear()
        if self._chat is not None:
            self._chat.__exit__(None, None, None)  # the template's process
            self._chat = None

    @property
    def reads(self) -> str:
        """How prompts are laid before the model and what its own files do to its answers, for digests of what was
        asked; empty as they are."""
        turn = "" if self.template is None else f"one turn of the user, by the chat template {self.template.digest}"
        return "; ".join(filter(None, (turn, own_words(self.own, can_repeat=False))))

    @property
    def said(self) -> str:
        """The same for the eye."""
        turn = "" if self.template is None else (
            f"each prompt is one turn of the user, by the chat template of {self.name} (sha256 "
            f"{self.template.digest[:12]}); --raw gives it as it is"
        )  # fmt: skip
        return "; ".join(filter(None, (turn, own_words(self.own, can_repeat=False))))

    def _turn(self, text: str) -> Ids:
        """A text as a turn of the user, up to where the assistant begins."""
        if text not in self._turns:
            if self._chat is None:
                self._chat = Chat(self.tokenizer, template=self.template)
            self._turns[text] = self._chat.prompt([{"role": "user", "content": text}])
        return self._turns[text]

    def ids(self, text: str) -> Ids:
        """A prompt as the model reads it."""
        if self.template is not None:
            return self._turn(text)
        ids: Ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        if not self.both and ids[-1:] == [self.tokenizer.eos_token_id]:
            ids = ids[:-1]  # a decoder writes on: the text has not ended
        if not ids:  # nothing to go on from: what a text begins with
            begin = self.tokenizer.bos_token_id
            ids = [int(begin if begin is not None else self.stop[0])]
        return ids

    def parts(self, prompt: str, option: str) -> tuple[Ids, Ids]:
        """Ids of a prompt and of what goes on from it, as they stand together.

        Raises:
            DataError: the option has no token of its own.
        """
        if self.both:
            found = [int(self.model.config.decoder_start_token_id)], self._bare(option.strip())
        elif self.template is not None:
            found = self.ids(prompt), self._bare(option.strip())  # a turn begins without the blank of running text
        else:
            context = self.ids(prompt)
            whole = self.ids(prompt + option) if prompt else [*context, *self._bare(option)]
            # Where its first letters join the prompt's last token, it is scored as it is written alone.
            joins = whole[: len(context)] != context
            found = context, self._bare(option) if joins else whole[len(context) :]
        if not found[1]:
            raise DataError(f"option {option!r} has no token of its own. Give the label a word: --words.")
        return found

    def _bare(self, option: str) -> Ids:
        return list(self.tokenizer(option, add_special_tokens=False)["input_ids"])

    def room(self, text: str) -> int | None:
        """Tokens that may be written after a text; None where nothing limits them."""
        return None if self.limit is None else self.limit - (1 if self.both else self.count(text))

    # ------------------------------------------------------------------ scores

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        """The log-probability of each option after its prompt, summed over the option's tokens.

        Raises:
            DataError: a prompt that is longer than the model reads, or an option without tokens.
            ModelError: logits that are no numbers.
        """
        begun = time.monotonic()
        own = [[self.parts(request.prompt, option) for option in request.options] for request in requests]
        rows: list[list[_Row]] = []
        for number, (request, parts) in enumerate(zip(requests, own, strict=True)):
            longest = max(len(option) for _, option in parts)
            if (room := self.room(request.prompt)) is not None and room < longest:
                raise DataError(
                    f"a prompt of {self.count(request.prompt)} tokens and an option of {longest}: {self.name} has "
                    f"{self.limit} positions. The prompt begins {request.prompt[:60]!r}. Show fewer rows, or "
                    "shorten it."
                )
            # A pass tells of every option that it holds the beginning of: those of one token need the prompt alone.
            tails = sorted({tuple(option[:-1]) for _, option in parts}, key=lambda tail: (-len(tail), tail))
            whole = [t for n, t in enumerate(tails) if all(other[: len(t)] != t for other in tails[:n])]
            rows.append([_Row(number, request.prompt, parts[0][0], tail) for tail in whole])
            self.cost.read += self.count(request.prompt) + sum(len(option) for _, option in parts)
        wanted = [[option for _, option in parts] for parts in own]
        with self.answering():
            for piece, shared in self._pieces([row for of in rows for row in of]):
                self._pass(piece, shared, wanted)
        found = [
            Scored(chances=tuple(_chance(o, of) for o in options), tokens=tuple(len(o) for o in options))
            for options, of in zip(wanted, rows, strict=True)
        ]
        if lost := next((r for r, one in zip(requests, found, strict=True) if any(map(isnan, one.chances))), None):
            raise ModelError(
                f"{self.name}: gives no number for what goes on from {lost.prompt[:60]!r}: its logits are not finite. "
                "Ask another model, or with --device cpu."
            )
        self.cost.requests += len(requests)
        self.cost.seconds += time.monotonic() - begun
        return found

    def _pieces(self, rows: list[_Row]) -> Iterator[tuple[list[_Row], Ids]]:
        """Batches, longest rows first, and what the rows of each share."""
        for members, shared in self.alike([row.ids for row in rows], [len(row.context) for row in rows]):
            ordered = sorted((rows[i] for i in members), key=lambda row: -len(row.ids))
            while ordered:
                width = len(ordered[0].ids) + (self.count(ordered[0].prompt) if self.both else 0)
                count = min(max(1, self.tokens // width), ROWS)
                yield ordered[:count], shared
                ordered = ordered[count:]

    def _pass(self, rows: list[_Row], shared: Ids, wanted: Sequence[Sequence[Ids]]) -> None:
        """Fill in what the rows tell of their requests' options."""
        logits = self.logits([row.ids for row in rows], shared, [row.prompt for row in rows])
        for at, row in enumerate(rows):
            first = len(row.context) - len(shared) - 1
            chances = logits[at, first : first + len(row.tail) + 1].float().log_softmax(-1).cpu()  # (tail + 1, words)
            for option in wanted[row.request]:
                for place, token in enumerate(option):
                    if tuple(option[:place]) == row.tail[:place] and place <= len(row.tail):
                        row.told[place, token] = float(chances[place, token])

    def logits(self, sequences: Sequence[Ids], shared: Ids, prompts: Sequence[str] = ()) -> Tensor:
        """(rows, longest, words) of what stands behind the shared part; rows are padded behind their last token.

        Args:
            prompts: of an encoder-decoder: what goes into its encoder.
        """
        ids = self.padded([ids[len(shared) :] for ids in sequences])
        more: dict[str, Any] = {}
        if self.both:
            encoded = [self.ids(prompt) for prompt in prompts]
            mask = self.padded([[1] * len(e) for e in encoded], 0)
            more = {"input_ids": self.padded(encoded), "attention_mask": mask, "decoder_input_ids": ids}
            self.cost.computed += sum(map(len, encoded))
        else:
            more = {"input_ids": ids, **self.behind(shared, len(sequences))}
        self.cost.computed += sum(len(s) - len(shared) for s in sequences)
        logits: Tensor = self.model(**more).logits
        return logits

    # ------------------------------------------------------------------ what prompts share

    def alike(self, sequences: Sequence[Ids], tops: Sequence[int]) -> list[tuple[list[int], Ids]]:
        """Numbers of the sequences that begin alike, with what they share; those that share too little together.

        Args:
            tops: of each its prompt's tokens, the last of which is never shared: it tells what comes next.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, ids in enumerate(sequences):
            groups.setdefault(tuple(ids[:LEAST_SHARED]), []).append(i)
        found, rest = [], []
        for members in groups.values():
            if shared := self.shared([sequences[i] for i in members], min(tops[i] for i in members)):
                found.append((members, shared))
            else:
                rest += members
        return [*found, *([(rest, [])] if rest else [])]

    def shared(self, sequences: Sequence[Ids], top: int) -> Ids:
        """What all of these begin with, where it is worth a pass of its own and the model takes it."""
        if self.share is False or len(sequences) < 2:
            return []
        first, last = min(sequences), max(sequences)  # what these share, all share
        same = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        common = first[: min(same, top - 1)]
        if len(common) < LEAST_SHARED:
            return []
        for known in self._kept:  # one from before, if it is nearly as long
            if len(known) >= 0.9 * len(common) and tuple(common[: len(known)]) == known:
                return list(known)
        with self.answering():
            if self.share is None:
                self.share = self._shares(common, sequences[0])
        return common if self.share else []

    def behind(self, shared: Ids, rows: int) -> dict[str, Any]:
        """What the model is called with where a shared part stands before each of so many rows."""
        if not shared:
            return {}
        if tuple(shared) not in self._kept:
            while len(self._kept) >= KEPT:
                del self._kept[next(iter(self._kept))]
            ids = torch.tensor([shared], device=self.device)
            self._kept[tuple(shared)] = self.model(input_ids=ids, use_cache=True).past_key_values
            self.cost.computed += len(shared)
        cache = copy.deepcopy(self._kept[tuple(shared)])  # a pass writes into it
        cache.batch_repeat_interleave(rows)
        return {"past_key_values": cache, "use_cache": True}

    def _shares(self, common: Ids, whole: Ids) -> bool:
        """Whether logits behind a shared part are those of the whole."""
        before = self.cost.computed
        try:
            beside, alone = (self.logits([whole], part)[0, -1].float() for part in (common, []))
        except (AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError):
            self._kept.clear()
            return False  # its states are no keys and values, or a method stands in the way
        finally:
            self.cost.computed = before  # a trial, which no request asked for
        self._kept.clear()
        return apart(beside, alone) <= self.rounding

    @property
    def rounding(self) -> float:
        """What may differ between two ways of computing the same, as a share of the spread."""
        halves = self.precision.name != "fp32" or any(p.element_size() < 4 for p in self.model.parameters())
        return ROUNDING_IN_HALVES if halves else ROUNDING

    # ------------------------------------------------------------------ text

    def write(self, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
        """Texts after each prompt, greedily or drawn, to a stop token, a stop word or the longest allowed.

        Raises:
            DataError: a prompt that leaves no room for an answer.
        """
        begun = time.monotonic()
        for request in requests:
            if (room := self.room(request.prompt)) is not None and room < 1:
                raise DataError(
                    f"a prompt of {self.count(request.prompt)} tokens leaves no room for an answer: {self.name} has "
                    f"{self.limit} positions. It begins {request.prompt[:60]!r}. Show fewer rows, or shorten it."
                )
        with self.answering():
            found = written(self, requests, names)
        self.cost.requests += len(requests)
        self.cost.read += sum(self.count(request.prompt) for request in requests)
        self.cost.written += sum(text.tokens for texts in found for text in texts)
        self.cost.seconds += time.monotonic() - begun
        return found

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within, the model answers: no gradient, in the precision that was chosen."""
        with torch.inference_mode(), self.precision.autocast(self.device), self.within(), quiet():
            yield

    def padded(self, rows: Sequence[Sequence[int]], fill: int | None = None) -> Tensor:
        """(rows, longest), filled up behind."""
        longest = max(map(len, rows))
        filled = [[*row, *([self.pad_id if fill is None else fill] * (longest - len(row)))] for row in rows]
        return torch.tensor(filled, dtype=torch.long, device=self.device)


def _chance(option: Ids, rows: Sequence[_Row]) -> float:
    row = next(row for row in rows if row.tail[: len(option) - 1] == tuple(option[:-1]))
    return sum(row.told[place, token] for place, token in enumerate(option))

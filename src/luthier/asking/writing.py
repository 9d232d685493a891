"""Text after prompts, token by token: greedily or drawn, many texts of one prompt from one reading of it.

A prompt is read once and its keys and values repeated for its n texts. Prompts of other lengths share a batch if the
model's logits are the same with the padding masked, which is tried on the first batch that needs any.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from luthier.asking.machine import Cost
from luthier.asking.requests import Text, Write
from luthier.training.sampling import Drawn
from luthier.workflow.controls import own_processors

__all__ = ["apart", "written"]

ROWS = 32
"""Texts that are written side by side."""


class Reader(Protocol):
    """What reads prompts and computes logits: `luthier.asking.local.Local`."""

    model: Any
    tokenizer: Any
    device: torch.device
    both: bool
    stop: tuple[int, ...]
    pad_id: int
    tokens: int
    pads: bool | None
    cost: Cost

    @property
    def rounding(self) -> float: ...
    def count(self, text: str) -> int: ...
    def ids(self, text: str) -> list[int]: ...
    def room(self, text: str) -> int | None: ...
    def padded(self, rows: Sequence[Sequence[int]]) -> Tensor: ...
    def shared(self, sequences: Sequence[list[int]], top: int) -> list[int]: ...
    def behind(self, shared: list[int], rows: int) -> dict[str, Any]: ...


def written(on: Reader, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
    """One reply to each request; see `Local.write`."""
    found: dict[int, tuple[Text, ...]] = {}

    def alike(i: int) -> tuple[Any, ...]:
        request = requests[i]
        length = on.count(request.prompt)
        return (request.n, request.temperature, _most(on, request), -length if on.pads is False or on.both else 0)

    order = sorted(range(len(requests)), key=lambda i: (*alike(i), -on.count(requests[i].prompt)))
    waiting = [list(group) for _, group in groupby(order, alike)]
    while waiting:
        group, *waiting = waiting
        count = max(1, min(ROWS // requests[group[0]].n, on.tokens // on.count(requests[group[0]].prompt)))
        piece, rest = group[:count], group[count:]
        if _pads(on, [on.ids(requests[i].prompt) for i in piece]) is False:
            parted = sorted(piece, key=alike)
            waiting = [*(list(of) for _, of in groupby(parted, alike)), *([rest] if rest else []), *waiting]
            continue
        waiting = [rest, *waiting] if rest else waiting
        for i, texts in zip(piece, _texts(on, [requests[i] for i in piece], [names[i] for i in piece]), strict=True):
            found[i] = texts
    return [found[i] for i in range(len(requests))]


def _most(on: Reader, request: Write) -> int:
    room = on.room(request.prompt)
    return request.max_tokens if room is None else min(request.max_tokens, room)


def _pads(on: Reader, prompts: Sequence[list[int]]) -> bool:
    """Whether these prompts may stand in one batch."""
    if len({len(ids) for ids in prompts}) < 2:
        return True
    if on.both:
        return False
    if on.pads is None:
        least = min(range(len(prompts)), key=lambda i: len(prompts[i]))
        before = on.cost.computed
        beside, alone = _Reading(on, prompts).logits[least], _Reading(on, [prompts[least]]).logits[0]
        on.cost.computed = before  # a trial
        on.pads = apart(beside, alone) <= on.rounding
    return on.pads


class _Reading:
    """Prompts that have been read: logits (rows, words) of what follows, and all that the next token needs."""

    def __init__(self, on: Reader, prompts: Sequence[list[int]]) -> None:
        self.on = on
        if on.both:
            ids = on.padded(prompts)
            encoder = on.model.get_encoder()(input_ids=ids, attention_mask=torch.ones_like(ids))
            begin = torch.full((len(prompts), 1), int(on.model.config.decoder_start_token_id), device=on.device)
            self.fixed: dict[str, Any] = {"encoder_outputs": encoder, "attention_mask": torch.ones_like(ids)}
            out = on.model(**self.fixed, decoder_input_ids=begin, use_cache=True)
            self.mask, self.next = torch.ones_like(begin), torch.ones(len(prompts), dtype=torch.long)
            self.logits: Tensor = out.logits[:, -1].float()
        else:
            shared = on.shared(prompts, min(map(len, prompts)))
            own = [ids[len(shared) :] for ids in prompts]
            ids = on.padded(own)
            mask = torch.ones((len(own), len(shared) + ids.shape[1]), dtype=torch.long, device=on.device)
            for row, tokens in zip(mask, own, strict=True):
                row[len(shared) + len(tokens) :] = 0
            self.next = torch.tensor([len(p) for p in prompts], device=on.device)
            padded = {"attention_mask": mask} if not bool(mask.all()) else {}
            self.padded = bool(padded)
            out = on.model(input_ids=ids, **{**on.behind(shared, len(own)), "use_cache": True}, **padded)
            last = torch.tensor([len(tokens) - 1 for tokens in own], device=on.device)
            self.logits = out.logits[torch.arange(len(own), device=on.device), last].float()
            self.mask, self.fixed = mask, {}
        on.cost.computed += sum(map(len, prompts)) - (0 if on.both else len(prompts) * len(shared))
        self.cache = out.past_key_values

    def repeat(self, n: int) -> None:
        """Each row n times, one after the other."""
        if n == 1:
            return
        self.cache.batch_repeat_interleave(n)
        self.logits, self.mask = self.logits.repeat_interleave(n, 0), self.mask.repeat_interleave(n, 0)
        self.next = self.next.repeat_interleave(n, 0)
        if self.on.both:
            encoder = self.fixed["encoder_outputs"]
            encoder["last_hidden_state"] = encoder["last_hidden_state"].repeat_interleave(n, 0)
            self.fixed["attention_mask"] = self.fixed["attention_mask"].repeat_interleave(n, 0)

    def go_on(self, tokens: Tensor) -> None:
        """Put one token behind each row. `tokens`: (rows,)."""
        ids = tokens[:, None]
        if self.on.both:
            out = self.on.model(**self.fixed, decoder_input_ids=ids, past_key_values=self.cache, use_cache=True)
        else:
            more: dict[str, Any] = {}
            self.mask = torch.cat([self.mask, torch.ones_like(ids)], dim=1)
            if self.padded:
                more = {"attention_mask": self.mask, "position_ids": self.next[:, None]}
            out = self.on.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **more)
            self.next = self.next + 1
        self.cache, self.logits = out.past_key_values, out.logits[:, -1].float()


def _texts(on: Reader, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
    """Requests of one n, temperature and length."""
    first = requests[0]
    reading = _Reading(on, [on.ids(request.prompt) for request in requests])
    reading.repeat(first.n)
    rows = [(request, name) for request, of in zip(requests, names, strict=True) for name in of]
    draw = Drawn([name for _, name in rows], first.temperature) if first.temperature > 0 else None
    ids: list[list[int]] = [[] for _ in rows]
    chances, texts = [0.0] * len(rows), [""] * len(rows)
    ended: list[bool | None] = [None] * len(rows)  # None while it goes on
    nothing = torch.empty(0)
    most = _most(on, first)
    own = _Own(on, [request for request, _ in rows], most)
    for step in range(most):
        logits = reading.logits
        wanted = own(ids, logits)
        tokens = (wanted if draw is None else draw(nothing, wanted)).argmax(-1)
        told = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
        for row, (request, _) in enumerate(rows):
            if ended[row] is not None:
                continue
            token = int(tokens[row])
            chances[row] += told[row]
            if token in on.stop:
                ended[row] = True
                continue
            ids[row].append(token)
            texts[row] = on.tokenizer.decode(ids[row], skip_special_tokens=True)
            cuts = [at for word in request.stop if (at := texts[row].find(word)) >= 0]
            if cuts:
                texts[row], ended[row] = texts[row][: min(cuts)], True
        if step + 1 == most or all(one is not None for one in ended):
            break
        reading.go_on(tokens)
    made = [
        Text(text=text, chance=chance, tokens=len(own), ended=bool(end))
        for text, chance, own, end in zip(texts, chances, ids, ended, strict=True)
    ]
    return [tuple(made[k * first.n : (k + 1) * first.n]) for k in range(len(requests))]


class _Own:
    """What the model's own generation_config does to logits, of each text by itself: its padding is none of its words.

    The chance of a text stays the model's.
    """

    def __init__(self, on: Reader, requests: Sequence[Write], most: int) -> None:
        self.device = on.device
        prompts = [on.ids(request.prompt) for request in requests]
        start = [int(on.model.config.decoder_start_token_id)] if on.both else []
        self.begins = [start or prompt for prompt in prompts]
        self.of = [
            own_processors(on.model, begin, most, stop=on.stop, pad_id=on.pad_id, encoded=prompt)
            for begin, prompt in zip(self.begins, prompts, strict=True)
        ]

    def __call__(self, written: Sequence[list[int]], logits: Tensor) -> Tensor:
        """Logits (rows, words) after so many ids of each row."""
        if not any(self.of):
            return logits
        found = []
        for begin, ids, row, steps in zip(self.begins, written, logits, self.of, strict=True):
            so_far, changed = torch.tensor([[*begin, *ids]], device=self.device), row[None]
            for step in steps:
                changed = step(so_far, changed)
            found.append(changed)
        return torch.cat(found)


def apart(one: Tensor, other: Tensor) -> float:
    """How far two rows of logits are from each other, as a share of their spread."""
    spread = float((other - other.mean()).square().mean().sqrt())
    return float((one - other).square().mean().sqrt()) / max(spread, 1e-12)

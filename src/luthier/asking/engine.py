"""Requests of many queries, gathered and put to a machine; the same request is put once.

Each round takes what all open queries ask for, in the order of the queries. A query's texts are drawn by names made of
seed, row and number, so no neighbour changes them. What fails ends the wave it is in; rows that were answered before
are handed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.asking.desk import Desk, Query
from luthier.asking.machine import Cost, Machine
from luthier.asking.way import Answer, Asking, Reply, Request, Score, Way, Write
from luthier.core import key

__all__ = ["Of", "Told", "put"]


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a query was answered, and what it was asked."""

    query: Query
    answer: Answer
    prompts: tuple[str, ...] = field(repr=False)
    """of its requests, in order"""
    written: tuple[str, ...] = field(default=(), repr=False)
    reads: str = field(default="", repr=False)
    """how the machine laid prompts before its model, where not as they are"""

    @property
    def digests(self) -> tuple[str, ...]:
        """Of the prompts: the same for the same prompt, laid before the model in the same way."""
        how = f"{self.reads}\0" if self.reads else ""
        return tuple(hashlib.sha256(f"{how}{prompt}".encode()).hexdigest()[:16] for prompt in self.prompts)


@dataclass(frozen=True, kw_only=True)
class Of:
    """One way with one seed: what every row was answered, and what that cost."""

    name: str
    seed: int
    told: tuple[Told, ...]
    cost: Cost


@dataclass
class _Open:
    query: Query
    asking: Asking
    waiting: Sequence[Request] = ()
    prompts: list[str] = field(default_factory=list)
    written: list[str] = field(default_factory=list)
    answer: Answer | None = None
    calls: int = 0


def put(
    way: Way, queries: Sequence[Query], desk: Desk, machine: Machine,
    done: Callable[[list[Told]], None] = lambda wave: None,
) -> list[Told]:  # fmt: skip
    """Ask about every query.

    Args:
        done: is given each wave of queries that are answered.

    Raises:
        LuthierError: of the machine; `done` is given what was answered before.
    """
    told: list[Told] = []
    known: dict[Request, Reply] = {}
    for start in range(0, len(queries), machine.wave):
        wave = [_Open(query, way.answer(query, desk)) for query in queries[start : start + machine.wave]]
        for one in wave:
            _go_on(one, None, way.most_calls)
        try:
            while asked := [one for one in wave if one.answer is None]:
                _reply([(one.query, request) for one in asked for request in one.waiting], known, desk, machine)
                for one in asked:
                    replies = [known[_named(one.query, request)] for request in one.waiting]
                    one.written += [t.text for reply in replies if isinstance(reply, tuple) for t in reply]
                    _go_on(one, replies, way.most_calls)
        finally:  # where something failed, those of the wave that had come to their end
            new = [
                Told(
                    query=one.query,
                    answer=one.answer,
                    prompts=tuple(one.prompts),
                    written=tuple(one.written),
                    reads=machine.reads,
                )
                for one in wave
                if one.answer is not None
            ]
            told += new
            done(new)
        known = {request: reply for request, reply in known.items() if isinstance(request, Score)}
    return told


def _go_on(one: _Open, replies: Sequence[Any] | None, most: int) -> None:
    """Hand a query its replies, and take what it asks for next."""
    try:
        one.waiting = next(one.asking) if replies is None else one.asking.send(replies)
    except StopIteration as ended:
        one.answer = ended.value
        return
    one.calls += len(one.waiting)
    if one.calls > most:
        one.asking.close()
        one.answer = Answer(said=None, note=f"stopped: it asked for more than {most} replies")
        return
    one.prompts += [request.prompt for request in one.waiting]


def _named(query: Query, request: Request) -> Any:
    """Requests of this name have the same reply: what is drawn is drawn for one query."""
    return request if isinstance(request, Score) or request.temperature == 0 else (query.number, request)


def _reply(asked: Sequence[tuple[Query, Request]], known: dict[Any, Reply], desk: Desk, machine: Machine) -> None:
    """Put what is not known yet to the machine, each once."""
    new = {name: (query, request) for query, request in asked if (name := _named(query, request)) not in known}
    scores = {name: request for name, (_, request) in new.items() if isinstance(request, Score)}
    writes = {name: (query, request) for name, (query, request) in new.items() if isinstance(request, Write)}
    if scores:
        known.update(zip(scores, machine.score(list(scores.values())), strict=True))
    if writes:
        names = [
            tuple(key(desk.seed, "text", query.number, request.stream, sample) for sample in range(request.n))
            for query, request in writes.values()
        ]
        found = machine.write([request for _, request in writes.values()], names)
        known.update(zip(writes, found, strict=True))

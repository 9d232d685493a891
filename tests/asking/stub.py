"""A machine that is a function: it answers requests by rules of the test, and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from luthier.asking.desk import LABELLED, OPEN, Desk, Query, Shown
from luthier.asking.engine import Told, put
from luthier.asking.machine import Cost
from luthier.asking.way import Score, Scored, Text, Way, Write

__all__ = ["Stub", "asked", "desk", "query", "shown"]


class Stub:
    """Args:
    chance: (prompt, option) -> log-probability.
    text: (prompt, seed of the draw) -> what is written, before stop words are heeded.
    """

    name = "stub"
    reads = said = ""
    wave = 3

    def __init__(
        self, chance: Callable[[str, str], float] = lambda prompt, option: 0.0,
        text: Callable[[str, int], str | tuple[str, float]] | None = None, limit: int | None = None,
    ) -> None:  # fmt: skip
        self.chance, self.text, self.limit = chance, text, limit
        self.scores, self.writes = True, text is not None
        self.cost = Cost()
        self.rounds: list[list[Any]] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def size(self, text: str) -> int:
        return self.count(text)

    def forget(self) -> None:
        pass

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        self.rounds.append(list(requests))
        return [
            Scored(
                chances=tuple(self.chance(r.prompt, o) for o in r.options),
                tokens=tuple(len(o.split()) for o in r.options),
            )
            for r in requests
        ]

    def write(self, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
        assert self.text is not None
        self.rounds.append(list(requests))
        return [tuple(self._text(r, seed) for seed in seeds) for r, seeds in zip(requests, names, strict=True)]

    def _text(self, request: Write, seed: int) -> Text:
        assert self.text is not None
        said = self.text(request.prompt, seed if request.temperature > 0 else 0)
        text, chance = said if isinstance(said, tuple) else (said, -1.0)
        for word in request.stop:
            text = text.partition(word)[0]
        return Text(text=text, chance=chance, tokens=len(text.split()))

    @property
    def requests(self) -> list[Any]:
        return [request for requests in self.rounds for request in requests]


def query(text: str, number: int = 0) -> Query:
    return Query(number=number, place=f"rows.csv:{number + 1}", texts=(text,))


def shown(text: str, answer: str, number: int = 0, **row: Any) -> Shown:
    return Shown(number=number, place=f"rows.csv:{number + 1}", texts=(text,), answer=answer, row=row)


def desk(pool: Sequence[Shown] = (), words: Mapping[str, str] | None = None, **more: Any) -> Desk:
    """A desk with these rows; labels where `words` are given."""
    return Desk(pool=tuple(pool), words=words or {}, template=LABELLED if words else OPEN, **more)


def asked(way: Way, texts: Sequence[str], on: Desk, machine: Stub) -> list[Told]:
    """Every text is asked about."""
    return put(way, [query(text, i) for i, text in enumerate(texts)], on, machine)

"""Which rows are shown beside a query, in which order, and how many of them fit.

A row that is the query itself, or a copy of its text, is never shown beside it: the next one is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from luthier.asking.desk import Desk, Query, Shown
from luthier.asking.requests import Answer, Asking, Score, Scored, Write
from luthier.core import ConfigError, DataError, listed
from luthier.data.order import shuffled
from luthier.data.retrieval import nearest

__all__ = [
    "Overflow",
    "answered",
    "beside",
    "drawn",
    "fitted",
    "found",
    "longest_option",
    "prompt_with",
    "refuse_shots",
    "scored_by",
]

Overflow = Literal["refuse", "drop"]
SPARE = 8
"""Rows beyond k that may take the place of one that is the query itself."""


def drawn(desk: Desk, k: int, *, balanced: bool, order: int) -> list[Shown]:
    """k rows, and a few to spare behind them, drawn by the desk's seed: the same for all queries.

    Args:
        balanced: of each label as many, to one, in turns; in which order the labels stand in a turn is drawn too, so
            that the last shot, which counts most, is not of one label for every seed.
        order: 0 as drawn; another number puts the same k rows in another order.
    """
    ranks = shuffled(len(desk.pool), desk.seed, "shots").tolist()
    if balanced and desk.labels:
        of = {label: [i for i in ranks if desk.pool[i].answer == label] for label in desk.labels}
        turns = max(map(len, of.values()))
        labels = list(of)
        ranks = [
            of[labels[i]][turn]
            for turn in range(turns)
            for i in shuffled(len(labels), desk.seed, "labels of shots", turn)
            if turn < len(of[labels[i]])
        ]
    rows = [desk.pool[i] for i in ranks[: k + SPARE]]
    first = [rows[i] for i in shuffled(min(k, len(rows)), desk.seed, "order of shots", order)] if order else rows[:k]
    return [*first, *rows[k:]]


def beside(query: Query, rows: Sequence[Shown], k: int) -> list[Shown]:
    """The first k rows that are not the query."""
    return [row for row in rows if row.content != query.content][:k]


def found(desk: Desk, query: Query, k: int, by: str) -> list[Shown]:
    """The k rows nearest to a query, the nearest first, copies of it left out."""
    assert desk.find is not None
    same = [i for i, row in enumerate(desk.pool) if row.content == query.content]
    numbers = nearest(desk.find(by), "\n".join(query.texts), min(k, len(desk.pool) - len(same)), without=same)
    return [desk.pool[i] for i in numbers]


def longest_option(desk: Desk) -> int:
    """Tokens of the longest option."""
    return max(map(desk.size or desk.count, desk.options), default=0)


def fitted(
    desk: Desk, query: Query, shots: Sequence[Shown], room: int, overflow: Overflow, who: str, head: str | None = None
) -> list[Shown]:
    """The shots, where prompt and answer fit the model's positions.

    Args:
        room: tokens that the answer needs.
        overflow: with "drop", whole shots are left out until they fit, the first ones first: the last stands nearest to
            the query.

    Raises:
        ConfigError: they do not fit; says how many would.
    """
    if desk.limit is None:
        return list(shots)
    fits = next((n for n in range(len(shots), -1, -1) if _length(desk, query, shots, n, head) + room <= desk.limit), -1)
    if fits == len(shots):
        return list(shots)
    if fits < 0:
        alone = _length(desk, query, (), 0, head)
        raise ConfigError(
            f"{query.place}: its prompt has {alone} tokens without any row beside it and its answer needs {room}; the "
            f"model has {desk.limit} positions. Shorten the row or the template, or leave it out."
        )
    if overflow == "drop":
        return list(shots[len(shots) - fits :])
    raise ConfigError(
        f"{who}: {len(shots)} shots do not fit beside {query.place}: "
        f"{_length(desk, query, shots, len(shots), head)} tokens and {room} for the answer, and the model has "
        f"{desk.limit} positions. {fits} would fit: --set {who}.k={fits}, or --set {who}.overflow=drop."
    )


def prompt_with(
    desk: Desk, query: Query, shots: Sequence[Shown], room: int, overflow: Overflow, who: str
) -> tuple[str, str]:
    """The prompt of a query with as many of the shots as fit, and what is to be said of it; see `fitted`."""
    kept = fitted(desk, query, shots, room, overflow, who)
    return desk.prompt(query, kept), f"{len(kept)} of {len(shots)} shots fit" if len(kept) < len(shots) else ""


def answered(prompt: str, note: str, desk: Desk, length: str, max_tokens: int) -> Asking:
    """The likeliest label after a prompt, or the line that is written there where rows have no labels."""
    if not desk.labels:
        [[text]] = yield [Write(prompt=prompt, max_tokens=max_tokens, stop=("\n",))]
        return Answer(said=text.text.strip() or None, note=note)
    [scored] = yield [Score(prompt=prompt, options=desk.options)]
    return desk.likeliest(scored_by(scored, desk.options, length), note=note)


def _length(desk: Desk, query: Query, shots: Sequence[Shown], n: int, head: str | None) -> int:
    return desk.count(desk.prompt(query, shots[len(shots) - n :], head))


def refuse_shots(desk: Desk, k: int, who: str) -> None:
    """Raises: ConfigError or DataError, where there are not so many rows to show."""
    if k > len(desk.pool):
        raise ConfigError(
            f"{who}: {k} shots, and there are {len(desk.pool)} rows to show. At most --set {who}.k={len(desk.pool)}."
        )
    lacking = [label for label in desk.labels if all(row.answer != label for row in desk.pool)]
    if k and len(lacking) == len(desk.labels) and desk.labels:
        raise DataError(f"{who}: no row to show has a label ({listed(lacking)}). Give labelled rows, or --set k=0.")


def scored_by(scored: Scored, options: Sequence[str], length: str) -> list[float]:
    """Log-probabilities of options, whole ("sum"), or divided by their tokens or bytes (without the blank before)."""
    if length == "token":
        return [chance / tokens for chance, tokens in zip(scored.chances, scored.tokens, strict=True)]
    if length == "byte":
        return [chance / len(o.strip().encode()) for chance, o in zip(scored.chances, options, strict=True)]
    return list(scored.chances)

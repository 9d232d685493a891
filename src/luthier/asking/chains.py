"""Reasoning that is written out before its answer, and votes over several reasonings.

    1  prompt + "Let's think step by step."                   -> reasoning
    2  prompt + reasoning + "So the answer is"                 -> the answer, where the reasoning does not announce one

Rows that are shown have a column with the reasoning behind their answer; without such rows the model is told to think.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.asking.desk import GAP, Desk, Query, Shown
from luthier.asking.finals import final_answer, normalised_answer
from luthier.asking.requests import Answer, Asking, Request, Text, Write
from luthier.asking.shots import beside, drawn
from luthier.core import ConfigError, DataError, near

__all__ = ["Chain", "Chained", "chains", "check_column", "closing", "most_reasoned", "reasoned", "voted", "worked"]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """How a reasoning is asked for.

    Attributes:
        think: the words that begin it.
        then: the words before its answer.
        stop: what ends it.
    """

    think: str
    then: str
    max_tokens: int
    stop: tuple[str, ...] = (GAP,)


@dataclass(frozen=True, kw_only=True)
class Chained:
    """One reasoning, its answer (None where it has none), and the log-probability of all that was written for it."""

    text: str
    said: str | None
    chance: float


def check_column(desk: Desk, k: int, column: str | None, who: str, what: str) -> None:
    """Refuse shots without the column that they need.

    Raises:
        ConfigError: none is named. DataError: the rows have no such column, or too few have anything there.
    """
    if k == 0:
        return
    if column is None:
        raise ConfigError(
            f"{who}: {k} shots, and no column with {what}. Name it: --set {who}.{what.split()[-1]}=COLUMN."
        )
    columns = sorted({name for row in desk.pool[:100] for name in row.row})
    if column not in columns:
        raise DataError(
            f"{who}: the rows have no column {column!r}.{near(column, columns)} Their columns are {', '.join(columns)}."
        )
    having = [row for row in desk.pool if str(row.row.get(column) or "").strip()]
    if len(having) < k:
        raise DataError(
            f"{who}: {k} shots, and {len(having)} rows have anything in {column!r}. Show fewer: k={len(having)}."
        )


def worked(desk: Desk, query: Query, k: int, column: str | None) -> list[Shown]:
    """k rows with something in that column, drawn by the seed; never the query itself."""
    if k == 0:
        return []
    having = [row for row in desk.pool if str(row.row.get(str(column)) or "").strip()]
    rows = drawn(Desk(**{**vars(desk), "pool": tuple(having)}), k, balanced=False, order=0)
    return beside(query, rows, k)


def reasoned(desk: Desk, query: Query, shots: Sequence[Shown], column: str | None, chain: Chain) -> str:
    """The prompt up to where the reasoning goes on."""
    shown = [
        f"{desk.asked(row)} {str(row.row.get(str(column)) or '').strip()} {chain.then} {desk.word_of(row.answer)}."
        for row in shots
    ]
    begun = desk.asked(query) if shots else f"{desk.asked(query)} {chain.think}".rstrip()  # it goes on as they do
    return GAP.join([*([desk.before] if desk.before else []), *shown, begun])


def chains(
    desk: Desk, prompt: str, chain: Chain, n: int, temperature: float
) -> Generator[list[Request], Sequence[Any], list[Chained]]:
    """n reasonings after a prompt, each with its answer."""
    [texts] = yield [Write(prompt=prompt, n=n, temperature=temperature, max_tokens=chain.max_tokens, stop=chain.stop)]
    words = desk.words or None
    said = [_said(text, chain, words) for text in texts]
    silent = [i for i, one in enumerate(said) if one is None]
    more: dict[int, Text] = {}
    if silent:
        asked: list[Request] = [closing(f"{prompt}{texts[i].text}", chain) for i in silent]
        replies = yield asked
        more = {i: reply[0] for i, reply in zip(silent, replies, strict=True)}
    return [
        Chained(
            text=text.text,
            said=final_answer(f"The answer is {more[i].text}", words) if i in more else said[i],
            chance=text.chance + (more[i].chance if i in more else 0.0),
        )
        for i, text in enumerate(texts)
    ]


def most_reasoned(
    desk: Desk, query: Query, chain: Chain, k: int, rationale: str | None, n: int, temperature: float
) -> Asking:
    """What most of n reasonings about a query end in, behind k rows with their own; see `voted`."""
    prompt = reasoned(desk, query, worked(desk, query, k, rationale), rationale, chain)
    found = yield from chains(desk, prompt, chain, n, temperature)
    return voted(found, bool(desk.words))


def closing(text: str, chain: Chain) -> Write:
    """What is asked where a reasoning has come to no answer."""
    return Write(prompt=f"{text.rstrip()}\n{chain.then}", max_tokens=32, stop=("\n",))


def _said(text: Text, chain: Chain, words: Mapping[str, str] | None) -> str | None:
    """What a reasoning announces as its answer; of labels also the last that it names."""
    _, told, last = text.text.rpartition(chain.then)
    if told:
        return final_answer(f"The answer is {last}", words)
    if words or any(mark in text.text for mark in ("####", "\\boxed", "nswer is", "nswer:")):
        return final_answer(text.text, words)
    return None


def voted(found: Sequence[Chained], words: bool) -> Answer:
    """The answer that most reasonings end in; of equally many, the one whose reasonings are likelier in all.

    Reasonings without an answer are votes for none: they are counted, and none wins only where nothing else was said.
    """
    votes: dict[str, list[Chained]] = {}
    for one in found:
        if one.said is not None:
            votes.setdefault(one.said if words else normalised_answer(one.said), []).append(one)
    silent = sum(one.said is None for one in found)
    facts = {"votes": {name: len(of) for name, of in votes.items()}, "without": silent}
    if not votes:
        return Answer(said=None, note="no reasoning ends in an answer", facts=facts)
    most = max(map(len, votes.values()))
    tied = [name for name, of in votes.items() if len(of) == most]
    best = max(tied, key=lambda name: sum(one.chance for one in votes[name]))
    note = f"a tie of {' and '.join(tied)} with {most} votes each, broken by log-probability" if len(tied) > 1 else ""
    return Answer(said=votes[best][0].said, note=note, facts=facts)

"""Steps of a search: a line more of a solution, and how good a solution looks to the model.

A state is the lines so far. One line more is written behind them; a state ends with a line that announces an answer, or
where nothing more is written. Its worth is the mean of what several drawn verdicts say: sure 1, likely 0.5,
impossible 0.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.asking.chains import Chain, closing
from luthier.asking.desk import Desk, Query
from luthier.asking.finals import final_answer
from luthier.asking.requests import Answer, Request, Text, Write

__all__ = ["Steps", "Thinking", "answered", "closed", "grown", "question_of", "valued"]

Thinking = Generator[list[Request], Sequence[Any], Any]
VERDICTS = {"impossible": 0.0, "unlikely": 0.0, "sure": 1.0, "likely": 0.5, "maybe": 0.5}


@dataclass(frozen=True, kw_only=True)
class Steps:
    """How a search asks.

    Attributes:
        start: the prompt that the lines go on from.
        question: what the verdicts are about.
        k: lines that are tried behind a state.
        judges: verdicts on a state.
    """

    start: str
    question: str
    chain: Chain
    k: int
    judges: int
    temperature: float
    value: str


def answered(lines: Sequence[str]) -> bool:
    """Whether a state has come to its end: nothing was written, or its last line announces an answer."""
    return bool(lines) and (
        not lines[-1].strip() or any(w in lines[-1] for w in ("nswer is", "nswer:", "####", "\\boxed"))
    )


def grown(of: Steps, states: Sequence[tuple[str, ...]]) -> Thinking:
    """Of each state those with one line more, each once, in order; a state that has ended stays."""
    open_ = [state for state in states if not answered(state)]
    n = of.k
    replies = iter(
        (
            yield [
                Write(
                    prompt=of.start + "".join(f"{line}\n" for line in state), n=n, max_tokens=of.chain.max_tokens,
                    temperature=of.temperature if n > 1 else 0.0, stop=("\n",), stream=len(state),
                )
                for state in open_
            ]
        )
        if open_
        else ()
    )  # fmt: skip
    found: dict[tuple[str, ...], None] = {}
    for state in states:
        new = [state] if answered(state) else [(*state, text.text.rstrip()) for text in next(replies)]
        found |= dict.fromkeys(new)
    return list(found)


def valued(of: Steps, states: Sequence[tuple[str, ...]]) -> Thinking:
    """The worth of each state, from 0 to 1."""
    asked: list[Request] = [
        Write(
            prompt=of.value.replace("{question}", of.question).replace("{solution}", "\n".join(state)), n=of.judges,
            max_tokens=8,            temperature=of.temperature if of.judges > 1 else 0.0, stop=("\n",), stream=1000,
        )
        for state in states
    ]  # fmt: skip
    replies = yield asked
    return [sum(_verdict(text) for text in texts) / len(texts) for texts in replies]


def _verdict(text: Text) -> float:
    """The worth that a verdict names; one that names none says nothing: a half."""
    low = text.text.lower()
    return next((worth for word, worth in VERDICTS.items() if word in low), 0.5)


def closed(of: Steps, desk: Desk, lines: Sequence[str], facts: dict[str, Any], note: str = "") -> Thinking:
    """The answer of a state; asked for where its lines announce none."""
    words = desk.words or None
    text = "\n".join(lines)
    said = final_answer(text, words) if answered(lines) and lines[-1].strip() else None
    if said is None:
        [[last]] = yield [closing(of.start + text, of.chain)]
        said = final_answer(f"The answer is {last.text}", words)
    return Answer(said=said, note=note, facts=facts)


def question_of(desk: Desk, query: Query) -> str:
    """The row as a verdict reads it."""
    return desk.asked(query).rpartition("\n")[0] or desk.asked(query)

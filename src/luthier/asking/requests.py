"""What a way of asking may ask for, what it is sent, and what it says in the end. Plain values; no model."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Answer", "Asking", "Reply", "Request", "Score", "Scored", "Text", "Write"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """How likely does the model hold each of these to go on from the prompt?"""

    prompt: str
    options: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Write:
    """Write on from the prompt.

    Attributes:
        n: texts that are drawn, each by a name of its own.
        temperature: 0 takes the likeliest token each time.
        stop: words before which a text ends; they are no part of it.
        stream: tells apart draws of one query from the same prompt.
    """

    prompt: str
    n: int = 1
    temperature: float = 0.0
    max_tokens: int = 64
    stop: tuple[str, ...] = ()
    stream: int = 0


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Of each option its log-probability, a sum over its tokens, and how many these are."""

    chances: tuple[float, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Text:
    """What was written; its log-probability, a sum over its tokens (0 where nobody knows it); whether it ended."""

    text: str
    chance: float = 0.0
    tokens: int = 0
    ended: bool = True


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a query is answered.

    Attributes:
        said: a label, or a text; None where there is none, which is a wrong answer and no error.
        note: what is to be known of it, such as that a tie was broken.
        shares: label -> its share, where labels were scored.
        facts: plain numbers, such as how many thoughts there were.
    """

    said: str | None
    note: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


Request = Score | Write
Reply = Scored | tuple[Text, ...]
Asking = Generator[Sequence[Request], Sequence[Any], Answer]

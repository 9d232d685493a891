"""What a way of asking is: a function of one query that gives out requests and is sent replies. It runs no model.

    def answer(self, query, desk):
        [scored] = yield [Score(prompt=desk.prompt(query), options=desk.options)]
        return desk.label_of(scored.chances)

Requests given out together are answered together, and those of many queries are batched. A search is a generator with a
loop in it; a vote asks once for several texts.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from luthier.core import Catalogue

if TYPE_CHECKING:
    from luthier.asking.desk import Desk, Query

__all__ = ["WAYS", "Answer", "Asking", "Reply", "Request", "Score", "Scored", "Text", "Way", "Write"]


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


class Way:
    """A way of asking. Its fields are its settings.

    Attributes:
        scores, writes: which requests it gives out; a machine that cannot answer them is refused before work.
        most_calls: requests of one query, at most: what a search that comes to no end is stopped by.
    """

    name: ClassVar[str]
    facts: ClassVar[dict[str, Any]]
    scores: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    most_calls: ClassVar[int] = 1000

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        """Refuse what cannot work, before anything is asked; what there is to say beforehand.

        Raises:
            ConfigError, DataError: names setting or row.
        """
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        """The requests of one query, and its answer."""
        raise NotImplementedError


WAYS: Catalogue[Way] = Catalogue("luthier.asking.ways", "way", "strategies --family asking")

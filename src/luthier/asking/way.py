"""What a way of asking is: a function of one query that gives out requests and is sent replies. It runs no model.

    def answer(self, query, desk):
        [scored] = yield [Score(prompt=desk.prompt(query), options=desk.options)]
        return desk.label_of(scored.chances)

Requests given out together are answered together, and those of many queries are batched. A search is a generator with a
loop in it; a vote asks once for several texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from luthier.asking.desk import Desk, Query
from luthier.asking.requests import Answer, Asking, Reply, Request, Score, Scored, Text, Write
from luthier.core import Catalogue

__all__ = ["WAYS", "Answer", "Asking", "Reply", "Request", "Score", "Scored", "Text", "Way", "Write"]


class Way:
    """A way of asking. Its fields are its settings.

    Attributes:
        scores, writes: which requests it gives out; a machine that cannot answer them is refused before work.
        most_calls: requests of one query, at most: what a search that comes to no end is stopped by.
        example: for its page, model and rows behind `luthier ask`, and what more it needs; left out, labelled texts.
    """

    name: ClassVar[str]
    facts: ClassVar[dict[str, Any]]
    scores: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    most_calls: ClassVar[int] = 1000
    example: ClassVar[str] = ""

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

"""For each row the solved rows that are most like it stand in its prompt, the nearest last.

    answer = argmax_y log P(y | near k, ..., near 1, x)    near i: the i-th nearest, by BM25 or an encoder

Paper: arXiv:2101.06804. Its encoder was fine-tuned to compare sentences; BM25 needs none, and is our default.

Cost: one prompt a row, none of which another shares; by an encoder also one pass over all rows that may be shown.
Claims: better than drawn rows, most where near rows have the same label.
Pitfalls: where the nearest rows share a label by chance the answer follows them: look at `luthier ask --show 2`. A copy
of the row itself is never shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.asking.desk import Desk, Query
from luthier.asking.shots import Overflow, answered, found, longest_option, prompt_with, refuse_shots
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import at_least


@WAYS.register("icl_retrieval", family="asking", paper="arXiv:2101.06804")
@dataclass(frozen=True, kw_only=True)
class ICLRetrieval(Way):
    """In-context learning with the rows nearest to each query."""

    scores: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    k: Annotated[int, "rows that are shown", at_least(1)] = 8
    by: Annotated[str, "bm25, or an encoder that makes vectors of texts, such as sample:minilm-l6"] = "bm25"
    order: Annotated[Literal["nearest_last", "nearest_first"], "where the nearest row stands"] = "nearest_last"
    length: Annotated[Literal["sum", "token", "byte"], "a label's log-probability: whole, by token, by byte"] = "sum"
    overflow: Annotated[Overflow, "where rows do not fit: refuse, or drop whole ones and say so"] = "refuse"
    max_tokens: Annotated[int, "of an answer that is written", at_least(1)] = 32

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        refuse_shots(desk, self.k, self.name)
        for query in queries:
            self.prompt(query, desk)
        return ()

    def prompt(self, query: Query, desk: Desk) -> tuple[str, str]:
        """The prompt, and what is to be said of it."""
        near = found(desk, query, self.k, self.by)
        shots = near[::-1] if self.order == "nearest_last" else near
        return prompt_with(desk, query, shots, longest_option(desk) or self.max_tokens, self.overflow, self.name)

    def answer(self, query: Query, desk: Desk) -> Asking:
        return (yield from answered(*self.prompt(query, desk), desk, self.length, self.max_tokens))

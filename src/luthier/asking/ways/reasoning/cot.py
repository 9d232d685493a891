"""The model writes the way to the answer before the answer.

    x, "Let's think step by step."  ->  reasoning  ->  "So the answer is"  ->  answer

With k rows that are shown, each with its own reasoning (column `rationale`), the model goes on as they do. The answer
is what the text announces, or what is written behind `then`.

Paper: arXiv:2201.11903 (shown reasonings); arXiv:2205.11916 (a sentence in their place).

Cost: as many written tokens a row as the reasoning has, and one request more where it announces no answer.
Claims: sums and puzzles that need several steps, by models of many billions of numbers; smaller ones gain nothing.
Pitfalls: a reasoning that reads well may be wrong. A row without an answer counts as wrong, and is counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.asking.chains import Chain, check_column, most_reasoned
from luthier.asking.desk import Desk, Query
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import at_least


@WAYS.register("cot", family="asking", paper="arXiv:2201.11903")
@dataclass(frozen=True, kw_only=True)
class CoT(Way):
    """Chain of thought."""

    writes: ClassVar[bool] = True

    k: Annotated[int, "rows that are shown with their reasoning", at_least(0)] = 0
    rationale: Annotated[str | None, "column with the reasoning of the rows that are shown"] = None
    think: Annotated[str, "words that begin a reasoning, where no rows are shown"] = "Let's think step by step."
    then: Annotated[str, "words before an answer"] = "So the answer is"
    max_tokens: Annotated[int, "of a reasoning", at_least(1)] = 128

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        check_column(desk, self.k, self.rationale, self.name, "the rationale")
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        chain = Chain(think=self.think, then=self.then, max_tokens=self.max_tokens)
        return (yield from most_reasoned(desk, query, chain, self.k, self.rationale, 1, 0.0))

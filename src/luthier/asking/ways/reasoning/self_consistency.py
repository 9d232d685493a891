"""Several reasonings are drawn, and the answer that most of them end in is taken.

    r_1, ..., r_m drawn at temperature T;   answer = argmax_a #{i: answer(r_i) = a}

Answers are compared as numbers or plain words, so 1,000 and 1000.0 are one. Of answers with as many votes the one whose
reasonings are likelier in all is taken, and the tie is noted with the row.

Paper: arXiv:2203.11171. Forty reasonings at 0.5 to 0.7 are quoted for it; the default here is fewer, our choice.

Cost: m times what cot writes; the prompt is read once.
Claims: more sums right than by one reasoning.
Pitfalls: m = 1 at temperature 0 is cot. Reasonings without an answer vote for nothing. A model that is wrong for one
reason is wrong in most of its reasonings.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.asking.chains import Chain, check_column, most_reasoned
from luthier.asking.desk import Desk, Query
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import ConfigError, at_least


@WAYS.register("self_consistency", family="asking", paper="arXiv:2203.11171")
@dataclass(frozen=True, kw_only=True)
class SelfConsistency(Way):
    """A vote over reasonings."""

    writes: ClassVar[bool] = True

    m: Annotated[int, "reasonings", at_least(1)] = 10
    temperature: Annotated[float, "of the draws", at_least(0)] = 0.7
    k: Annotated[int, "rows that are shown with their reasoning", at_least(0)] = 0
    rationale: Annotated[str | None, "column with the reasoning of the rows that are shown"] = None
    think: Annotated[str, "words that begin a reasoning, where no rows are shown"] = "Let's think step by step."
    then: Annotated[str, "words before an answer"] = "So the answer is"
    max_tokens: Annotated[int, "of a reasoning", at_least(1)] = 128

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        check_column(desk, self.k, self.rationale, self.name, "the rationale")
        if self.m > 1 and self.temperature == 0:
            raise ConfigError(f"{self.name}: {self.m} reasonings at temperature 0 are all the same. Draw, or m=1.")
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        chain = Chain(think=self.think, then=self.then, max_tokens=self.max_tokens)
        return (yield from most_reasoned(desk, query, chain, self.k, self.rationale, self.m, self.temperature))

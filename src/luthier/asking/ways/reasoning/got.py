"""Thoughts are split, written, merged and mended by a plan of operations: a graph, not a tree alone.

    plan   split 4; generate 1; aggregate 2; aggregate; refine 1

    split N        the row in N parts, one a line of what is written      generate N   N solutions of each thought
    step N         N lines more behind each thought, as in tot            keep N       the best N by verdicts
    aggregate N    each N thoughts merged into one; all without a number  refine N     each mended, N times at most

The answer is that of the best thought of the last operation. With each row stand its volume (thoughts that lead to it)
and its latency (how many after one another).

Paper: arXiv:2308.09687. The graph is given by the plan: none is found by the model.

Cost: what the plan says; requests of one operation are put together.
Claims: as good as a tree at less cost where parts can be solved alone and merged.
Pitfalls: each task wants a plan and words of its own; the words here ask in general. A plan of steps and keeps alone is
the search of tot by levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.asking.chains import Chain, reasoned
from luthier.asking.desk import Desk, Query
from luthier.asking.graph import Prompts, checked_plan, through
from luthier.asking.requests import Answer
from luthier.asking.thoughts import Steps, closed, question_of
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import at_least

VALUE = "{question}\nA solution so far:\n{solution}\nCan it lead to the answer? (sure, likely, impossible)\nVerdict:"


@WAYS.register("got", family="asking", paper="arXiv:2308.09687")
@dataclass(frozen=True, kw_only=True)
class GoT(Way):
    """Graph of thoughts."""

    writes: ClassVar[bool] = True

    plan: Annotated[str, "operations, with semicolons between"] = "generate 3; keep 1; refine 1"
    split: Annotated[str, "asks for {n} parts of {question}"] = "{question}\nSplit this into {n} parts, one a line:\n"
    generate: Annotated[str, "asks for a solution of {thought}"] = "{question}\nPart: {thought}\nSolution:"
    aggregate: Annotated[str, "asks to merge {thoughts}"] = "{question}\nSolutions:\n{thoughts}\nMerged into one:"
    refine: Annotated[str, "asks to mend {thought}"] = "{question}\nA solution: {thought}\nMended where it is wrong:"
    value: Annotated[str, "asks for a verdict, with {question} and {solution}"] = VALUE
    judges: Annotated[int, "verdicts on a thought", at_least(1)] = 3
    temperature: Annotated[float, "where several are drawn", at_least(0)] = 0.7
    max_tokens: Annotated[int, "of a thought", at_least(1)] = 64
    think: Annotated[str, "words that begin a solution of steps"] = "Let's think step by step."
    then: Annotated[str, "words before an answer"] = "So the answer is"

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        checked_plan(self.plan, self.name)
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        chain = Chain(think=self.think, then=self.then, max_tokens=self.max_tokens)
        of = Steps(
            start=reasoned(desk, query, (), None, chain), question=question_of(desk, query), chain=chain, k=1,
            judges=self.judges, temperature=self.temperature, value=self.value,
        )  # fmt: skip
        words = Prompts(split=self.split, generate=self.generate, aggregate=self.aggregate, refine=self.refine)
        best, facts = yield from through(checked_plan(self.plan, self.name), of, words)
        said: Answer = yield from closed(of, desk, best, facts)
        return said

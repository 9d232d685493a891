"""A search over partial solutions: the model proposes lines, and says how good a solution looks so far.

    bfs    of all states with one line more the best b go on, depth times; the best of the last is answered
    dfs    the best line first; what is worth less than `threshold` is cut off; back where nothing goes on

A state's worth is the mean of several drawn verdicts (sure 1, likely 0.5, impossible 0: numbers of ours). With b = 1
and k = 1 nothing is judged, and what is written is what cot writes, line by line.

Paper: arXiv:2305.10601 (both searches); arXiv:2305.08291 has a rule in the place of the verdicts, which is not built.

Cost: up to b k judges texts a level; `calls` requests at most, then the best so far is answered, and that is noted.
Claims: puzzles that need trial and return, by large models.
Pitfalls: a model that cannot tell a good solution from a bad one searches in vain: look at the verdicts (--show).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from luthier.asking.chains import Chain, reasoned
from luthier.asking.desk import Desk, Query
from luthier.asking.requests import Answer
from luthier.asking.thoughts import Steps, Thinking, answered, closed, grown, question_of, valued
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import ConfigError, at_least, between

VALUE = "{question}\nA solution so far:\n{solution}\nCan it lead to the answer? (sure, likely, impossible)\nVerdict:"


@WAYS.register("tot", family="asking", paper="arXiv:2305.10601")
@dataclass(frozen=True, kw_only=True)
class ToT(Way):
    """Tree of thoughts."""

    writes: ClassVar[bool] = True

    search: Annotated[Literal["bfs", "dfs"], "by levels, or into the depth"] = "bfs"
    b: Annotated[int, "states that go on from a level (bfs)", at_least(1)] = 5
    k: Annotated[int, "lines that are tried behind a state", at_least(1)] = 5
    depth: Annotated[int, "lines of a solution", at_least(1)] = 3
    judges: Annotated[int, "verdicts on a state", at_least(1)] = 3
    threshold: Annotated[float, "worth below which a state is cut off (dfs)", between(0, 1)] = 0.25
    temperature: Annotated[float, "of lines and verdicts", at_least(0)] = 0.7
    calls: Annotated[int, "requests of a row, at most", at_least(2)] = 200
    max_tokens: Annotated[int, "of a line", at_least(1)] = 64
    think: Annotated[str, "words that begin a solution"] = "Let's think step by step."
    then: Annotated[str, "words before an answer"] = "So the answer is"
    value: Annotated[str, "asks for a verdict, with {question} and {solution}"] = VALUE

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        if "{solution}" not in self.value:
            raise ConfigError(f"{self.name}.value: lacks {{solution}}, which the verdict is about. Put it in.")
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        chain = Chain(think=self.think, then=self.then, max_tokens=self.max_tokens)
        start = reasoned(desk, query, (), None, chain)
        of = Steps(
            start=start, question=question_of(desk, query), chain=chain, k=self.k, judges=self.judges,
            temperature=self.temperature, value=self.value,
        )  # fmt: skip
        facts: dict[str, Any] = {"calls": 0, "states": 0}
        best, note = yield from (self.by_levels(of, facts) if self.search == "bfs" else self.by_depth(of, facts))
        said: Answer = yield from closed(of, desk, best, facts, note)
        return said

    def by_levels(self, of: Steps, facts: dict[str, Any]) -> Thinking:
        """The best state of the last level, and what is to be said."""
        states: list[tuple[str, ...]] = [()]
        for _ in range(self.depth):
            open_ = sum(not answered(state) for state in states)
            if open_ == 0:
                break
            if facts["calls"] + open_ * (1 + self.k) > self.calls:  # lines, and a verdict on each
                return states[0], f"stopped by {self.calls} calls"
            facts["calls"] += open_
            states = yield from grown(of, states)
            facts["states"] += len(states)
            if len(states) > self.b:
                worths = yield from self.judged(of, states, facts)
                order = sorted(range(len(states)), key=lambda i: -worths[i])[: self.b]
                states = [states[i] for i in order]
        if len(states) > 1:
            worths = yield from self.judged(of, states, facts)
            states = [states[max(range(len(states)), key=lambda i: worths[i])]]
        return states[0], ""

    def by_depth(self, of: Steps, facts: dict[str, Any]) -> Thinking:
        """The first state that has come to its end, and what is to be said."""
        waiting: list[tuple[tuple[str, ...], float]] = [((), 1.0)]
        best: tuple[tuple[str, ...], float] = ((), 0.0)
        while waiting:
            state, worth = waiting.pop()
            if answered(state) or len(state) == self.depth:
                return state, ""
            if facts["calls"] + 1 + self.k > self.calls:
                return best[0] or state, f"stopped by {self.calls} calls"
            facts["calls"] += 1
            new = yield from grown(of, [state])
            facts["states"] += len(new)
            worths = (yield from self.judged(of, new, facts)) if self.k > 1 else [worth]
            kept = sorted(zip(new, worths, strict=True), key=lambda one: one[1])  # the best is taken first
            waiting += [one for one in kept if one[1] >= self.threshold]
            best = max([best, *kept], key=lambda one: (one[1], len(one[0])))
        return best[0], "every way was cut off; the best of them is answered"

    def judged(self, of: Steps, states: Sequence[tuple[str, ...]], facts: dict[str, Any]) -> Thinking:
        facts["calls"] += len(states)
        return (yield from valued(of, states))

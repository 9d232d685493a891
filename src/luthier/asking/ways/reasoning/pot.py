"""The model writes a program whose result is the answer; a jail computes it.

    x  ->  program that assigns ans  ->  run in a jail  ->  answer = ans;   where it fails: cot

The program may compute with numbers, texts and lists, and use math, fractions, decimal, statistics, itertools,
collections, functools.reduce and dates. It runs in a process of its own without files, network and other processes,
within limits of time, memory and output. It runs only where you say so: run = true.

Paper: arXiv:2211.12588.

Cost: one program a row, and a process that runs it; where it fails, what cot costs.
Claims: no slips of arithmetic; the model has to set the sum up, not to do it.
Pitfalls: a program may run and be wrong. How many failed, and why, stands with each row (--out). The jail is built for
programs that err; against an attacker who knows it, use a machine that holds nothing.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.asking.chains import Chain, chains, check_column, reasoned, voted, worked
from luthier.asking.desk import GAP, Desk, Query
from luthier.asking.finals import final_answer
from luthier.asking.requests import Answer, Write
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import ConfigError, above, at_least
from luthier.trust import programs

FENCE = re.compile(r"```(?:python)?\s*\n?(.*?)(?:```|\Z)", re.DOTALL)


@WAYS.register("pot", family="asking", paper="arXiv:2211.12588")
@dataclass(frozen=True, kw_only=True)
class PoT(Way):
    """Program of thoughts."""

    example: ClassVar[str] = "sample:smollm2-135m --data sample:trec6 --set run=true"
    writes: ClassVar[bool] = True

    run: Annotated[bool, "run what the model writes, in a jail; without it nothing is asked"] = False
    k: Annotated[int, "rows that are shown with their program", at_least(0)] = 0
    program: Annotated[str | None, "column with the program of the rows that are shown"] = None
    begin: Annotated[str, "words that begin a program"] = "# Python that computes the answer and assigns it to ans\n"
    max_tokens: Annotated[int, "of a program", at_least(1)] = 200
    seconds: Annotated[float, "of processor time for a program", above(0)] = 2.0
    think: Annotated[str, "of cot, where a program fails"] = "Let's think step by step."
    then: Annotated[str, "of cot, where a program fails"] = "So the answer is"

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        if not self.run:
            raise ConfigError(
                "pot runs programs that the model writes, in a jail on this machine, and has not been told to. Say so: "
                "--set pot.run=true, or ask by cot."
            )
        check_column(desk, self.k, self.program, self.name, "the program")
        return (f"pot: programs run in a jail, each for {self.seconds:g} s of processor time at most",)

    def answer(self, query: Query, desk: Desk) -> Asking:
        shots = worked(desk, query, self.k, self.program)
        shown = [f"{desk.asked(row)}\n{self.begin}{str(row.row[str(self.program)]).strip()}" for row in shots]
        prompt = GAP.join([*([desk.before] if desk.before else []), *shown, f"{desk.asked(query)}\n{self.begin}"])
        [[text]] = yield [Write(prompt=prompt, max_tokens=self.max_tokens, stop=("\n\n\n", "\nQuestion:", "\nText:"))]
        outcome = programs.run(code_in(text.text), seconds=self.seconds)
        if outcome.answer is not None:
            said = final_answer(outcome.answer, desk.words) if desk.words else outcome.answer
            return Answer(said=said, facts={"program": "ran"})
        chain = Chain(think=self.think, then=self.then, max_tokens=self.max_tokens)
        found = yield from chains(desk, reasoned(desk, query, (), None, chain), chain, 1, 0.0)
        return Answer(
            said=voted(found, bool(desk.words)).said, note=f"the program failed ({outcome.error}); answered by cot",
            facts={"program": outcome.error},
        )  # fmt: skip


def code_in(text: str) -> str:
    """The program in what was written: what stands in a fence, or all of it."""
    fenced = FENCE.search(text)
    return (fenced.group(1) if fenced else text).strip("\n")

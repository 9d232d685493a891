"""A few solved rows stand in the prompt before the one that is asked about; nothing is trained.

    answer = argmax_y log P(y | shot 1, ..., shot k, x)        a label: the likeliest of the labels' words
    answer = what is written up to the end of the line          a text, where rows have no labels

Paper: arXiv:2005.14165.

Cost: one prompt a row; what all prompts share is computed once.
Claims: with a large model near to what fine-tuning reaches.
Pitfalls: which rows are shown, and in which order, may matter more than how many: look at several seeds. A small model
often does no better than always naming one label. Rows and their order are drawn once for all queries, by the seed:
the labels' order too, turn by turn, since the last shot weighs most. Long labels are less likely than short ones:
length = "token".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from luthier.asking.desk import Desk, Query
from luthier.asking.shots import Overflow, answered, beside, drawn, longest_option, prompt_with, refuse_shots
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import at_least


@WAYS.register("icl", family="asking", paper="arXiv:2005.14165")
@dataclass(frozen=True, kw_only=True)
class ICL(Way):
    """In-context learning."""

    scores: ClassVar[bool] = True
    writes: ClassVar[bool] = True

    k: Annotated[int, "rows that are shown", at_least(0)] = 8
    balanced: Annotated[bool, "of each label as many, to one"] = True
    order: Annotated[int, "0 as they were drawn; another number names another order of the same rows"] = 0
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
        shots = beside(query, drawn(desk, self.k, balanced=self.balanced, order=self.order), self.k)
        return prompt_with(desk, query, shots, longest_option(desk) or self.max_tokens, self.overflow, self.name)

    def answer(self, query: Query, desk: Desk) -> Asking:
        return (yield from answered(*self.prompt(query, desk), desk, self.length, self.max_tokens))

"""An answer is scored by how much the row raises it over what the domain alone would make likely.

    answer = argmax_y  log P(y | shots, x) - log P(y | x_domain)        x_domain: the template's end, such as "Answer:"

Words that are likely anywhere gain nothing by it, and an answer whose chance is shared out among several spellings
loses nothing. With domain = "" it is the mutual information with the row (the empty context).

Paper: arXiv:2104.08315.

Cost: the labels once more behind the domain's words, asked once for all rows.
Claims: better than the plain likelihood where labels' words are unequally common.
Pitfalls: one domain text serves a whole data set; another one gives another score. The paper asks without shots, which
is the default here; the domain's text is never given any.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from luthier.asking.desk import FIELD, Desk, Query
from luthier.asking.shots import Overflow, beside, drawn, fitted, longest_option, refuse_shots
from luthier.asking.way import WAYS, Asking, Score, Way
from luthier.core import ConfigError, at_least


@WAYS.register("pmi_dc", family="asking", paper="arXiv:2104.08315")
@dataclass(frozen=True, kw_only=True)
class PMI(Way):
    """Domain-conditional pointwise mutual information."""

    scores: ClassVar[bool] = True

    k: Annotated[int, "rows that are shown", at_least(0)] = 0
    balanced: Annotated[bool, "of each label as many, to one"] = True
    order: Annotated[int, "0 as they were drawn; another number names another order of the same rows"] = 0
    overflow: Annotated[Overflow, "where rows do not fit: refuse, or drop whole ones and say so"] = "refuse"
    domain: Annotated[str | None, "what the domain alone says; left out, the template's words behind the text"] = None

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        refuse_shots(desk, self.k, self.name)
        if not desk.labels:
            raise ConfigError(f"{self.name} scores labels, and these rows have none. Use icl or cot.")
        for query in queries:
            self.requests(query, desk)
        return (f"{self.name}: the domain alone says {self.premise(desk)!r}",)

    def premise(self, desk: Desk) -> str:
        """What stands before an answer where nothing is known of the row."""
        if self.domain is not None:
            return self.domain
        return FIELD.split(desk.template.partition("{label}")[0])[-1].strip()

    def requests(self, query: Query, desk: Desk) -> tuple[list[Score], str]:
        """The row's own prompt, and the domain's."""
        shots = beside(query, drawn(desk, self.k, balanced=self.balanced, order=self.order), self.k)
        kept = fitted(desk, query, shots, longest_option(desk), self.overflow, self.name)
        asked = [
            Score(prompt=prompt, options=desk.options) for prompt in (desk.prompt(query, kept), self.premise(desk))
        ]
        return asked, f"{len(kept)} of {len(shots)} shots fit" if len(kept) < len(shots) else ""

    def answer(self, query: Query, desk: Desk) -> Asking:
        requests, note = self.requests(query, desk)
        own, alone = yield requests
        return desk.likeliest([a - b for a, b in zip(own.chances, alone.chances, strict=True)], note=note)

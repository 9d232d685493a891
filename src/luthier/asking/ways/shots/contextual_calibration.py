"""What the prompt answers to a text that says nothing is divided out of what it answers to the row.

    p_cf = mean over content-free texts of p(y | shots, text), each normalised over the labels
    q_y  = p(y | shots, x) / p_cf,y                             W = diag(p_cf)^-1, b = 0; answer = argmax q

The content-free texts stand in the very prompt of the row, with the same shots.

Paper: arXiv:2102.09690. Its code uses the three texts that are the default here.

Cost: three prompts more for a set of shots; they are asked once for all rows that have the same shots.
Claims: the same model is right more often, and its answers depend less on which rows are shown.
Pitfalls: what a content-free text is depends on the template: N/A is not free of content in every one. With few rows
its gain may be chance: read the interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log
from typing import Annotated, ClassVar, Literal

from luthier.asking.desk import Desk, Query
from luthier.asking.shots import Overflow, beside, drawn, fitted, longest_option, refuse_shots, scored_by
from luthier.asking.way import WAYS, Asking, Score, Way
from luthier.core import ConfigError, at_least


@WAYS.register("contextual_calibration", family="asking", paper="arXiv:2102.09690")
@dataclass(frozen=True, kw_only=True)
class ContextualCalibration(Way):
    """In-context learning, calibrated by content-free texts."""

    scores: ClassVar[bool] = True

    k: Annotated[int, "rows that are shown", at_least(0)] = 8
    balanced: Annotated[bool, "of each label as many, to one"] = True
    order: Annotated[int, "0 as they were drawn; another number names another order of the same rows"] = 0
    length: Annotated[Literal["sum", "token", "byte"], "a label's log-probability: whole, by token, by byte"] = "sum"
    overflow: Annotated[Overflow, "where rows do not fit: refuse, or drop whole ones and say so"] = "refuse"
    free: Annotated[tuple[str, ...], "texts that say nothing"] = ("N/A", "", "[MASK]")

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        refuse_shots(desk, self.k, self.name)
        if not desk.labels:
            raise ConfigError(f"{self.name} corrects the shares of labels, and these rows have none. Use icl or cot.")
        if not self.free:
            raise ConfigError(f"{self.name}.free: no text. Name one at least, such as N/A.")
        for query in queries:
            self.requests(query, desk)
        return ()

    def requests(self, query: Query, desk: Desk) -> tuple[list[Score], str]:
        """The row's own prompt, then those of the content-free texts."""
        shots = beside(query, drawn(desk, self.k, balanced=self.balanced, order=self.order), self.k)
        kept = fitted(desk, query, shots, longest_option(desk), self.overflow, self.name)
        nothing = [Query(number=-1, place="a content-free text", texts=(t,) * len(query.texts)) for t in self.free]
        asked = [Score(prompt=desk.prompt(one, kept), options=desk.options) for one in (query, *nothing)]
        return asked, f"{len(kept)} of {len(shots)} shots fit" if len(kept) < len(shots) else ""

    def answer(self, query: Query, desk: Desk) -> Asking:
        requests, note = self.requests(query, desk)
        own, *nothing = yield requests
        shares = [desk.likeliest(scored_by(one, desk.options, self.length)).shares for one in nothing]
        free = [sum(of[label] for of in shares) / len(shares) for label in desk.labels]
        scores = scored_by(own, desk.options, self.length)
        calibrated = [score - log(max(share, 1e-12)) for score, share in zip(scores, free, strict=True)]
        return desk.likeliest(calibrated, note=note)

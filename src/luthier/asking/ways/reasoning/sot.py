"""First an outline of an answer, then all its points at once.

    1  x  ->  3 to 10 points of a few words          2  each point, written out; all in one round          3  joined

The model is first asked whether x can be answered in points that do not need one another (route = true); where it says
no, or its outline cannot be read, the answer is written plainly.

Paper: arXiv:2307.15337. Its router is a prompt or a trained classifier; here it is a prompt.

Cost: more tokens (each point reads the question and the outline again), fewer steps one after another.
Claims: less time to an answer on hardware that is idle at one row; answers that are better ordered.
Pitfalls: sums and proofs need their steps in order: rows with labels are refused. Points cannot refer to each other.
Measure with --metric f1: long texts are never equal.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from luthier.asking.desk import Desk, Query
from luthier.asking.requests import Answer, Write
from luthier.asking.way import WAYS, Asking, Way
from luthier.core import ConfigError, at_least

OUTLINE = "{prompt}\n(Give only the outline, 3 to 10 numbered points of 3 to 5 words each.)\n1."
POINT = "{prompt}\nOutline:\n{outline}\nPoint {number} in one or two sentences:"
ROUTE = "{prompt}\nCan this be answered as a list of points that do not depend on each other? (yes, no)\nVerdict:"


@WAYS.register("sot", family="asking", paper="arXiv:2307.15337")
@dataclass(frozen=True, kw_only=True)
class SoT(Way):
    """Skeleton of thought."""

    example: ClassVar[str] = "sample:smollm2-135m --data ANSWERED.jsonl"
    writes: ClassVar[bool] = True

    route: Annotated[bool, "first ask whether points fit the question"] = True
    outline: Annotated[str, "asks for the points of {prompt}"] = OUTLINE
    point: Annotated[str, "asks for point {number} of {outline}"] = POINT
    least: Annotated[int, "points of an outline that is used", at_least(1)] = 2
    most: Annotated[int, "points that are written out", at_least(1)] = 10
    max_tokens: Annotated[int, "of a point, and a third of a plain answer", at_least(1)] = 64

    def refuse(self, desk: Desk, queries: Sequence[Query]) -> tuple[str, ...]:
        if desk.labels:
            raise ConfigError("sot writes texts of several points, and these rows have labels. Use icl or cot.")
        return ()

    def answer(self, query: Query, desk: Desk) -> Asking:
        prompt = desk.prompt(query)
        if self.route:
            [[verdict]] = yield [Write(prompt=ROUTE.replace("{prompt}", prompt), max_tokens=4, stop=("\n",))]
            if not verdict.text.strip().lower().startswith("yes"):
                return (yield from self.plainly(prompt, "points do not fit it"))
        asked = self.outline.replace("{prompt}", prompt)
        [[found]] = yield [Write(prompt=asked, max_tokens=160, stop=("\n\n",))]
        points = points_in(("1." if asked.endswith("1.") else "") + found.text)[: self.most]
        if len(points) < self.least:
            return (yield from self.plainly(prompt, f"an outline of {len(points)} points could not be used"))
        outline = "\n".join(f"{n}. {point}" for n, point in enumerate(points, 1))
        begun = self.point.replace("{prompt}", prompt).replace("{outline}", outline)
        replies = yield [
            Write(
                prompt=begun.replace("{number}", str(n)), max_tokens=self.max_tokens, stop=("\n\n", f"\nPoint {n + 1}")
            )
            for n in range(1, len(points) + 1)
        ]
        both = zip(points, replies, strict=True)
        texts = [f"{n}. {point}: {reply[0].text.strip()}" for n, (point, reply) in enumerate(both, 1)]
        facts: dict[str, Any] = {"points": len(points)}
        return Answer(said="\n".join(texts), facts=facts)

    def plainly(self, prompt: str, why: str) -> Asking:
        """The answer without an outline."""
        [[text]] = yield [Write(prompt=prompt, max_tokens=3 * self.max_tokens, stop=("\n\n",))]
        return Answer(said=text.text.strip() or None, note=f"written plainly: {why}", facts={"points": 0})


def points_in(text: str) -> list[str]:
    """Points of a numbered list, as far as its numbers go up by one.

    >>> points_in("1. Light\\n2) Water and air\\nso it is\\n4. x")
    ['Light', 'Water and air']
    """
    found: list[str] = []
    for number, point in re.findall(r"^\s*(\d+)[.)]\s*(.+?)\s*$", text, re.MULTILINE):
        if int(number) != len(found) + 1:
            break
        found.append(point.strip(" .:"))
    return found

"""What a way of asking is handed: rows that may be shown, words of labels, the template, and how long a prompt is.

    template   Text: {text}\\nAnswer: {label}

A row that is shown fills {label} with the word of its label; a query's prompt ends before it, and before the blank that
stands there: the blank begins each option.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from luthier.asking.requests import Answer
from luthier.core import ConfigError, key, near
from luthier.data.retrieval import Retriever
from luthier.data.rows import normalised

__all__ = ["LABELLED", "OPEN", "Desk", "Query", "Shown", "check_template"]

LABELLED = "Text: {text}\nAnswer: {label}"
OPEN = "Question: {text}\nAnswer: {label}"
FIELD = re.compile(r"\{(\w*)\}")
GAP = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Query:
    """A row that is asked about.

    Attributes:
        number: of the row among those held out; names the draws of its texts.
        place: where it stands, such as questions.csv:12.
        texts: one, or two of a pair.
    """

    number: int
    place: str
    texts: tuple[str, ...]

    @cached_property
    def content(self) -> str:
        """What makes two rows the same."""
        return "\x1f".join(normalised(text) for text in self.texts)


@dataclass(frozen=True, kw_only=True)
class Shown(Query):
    """A row that may be shown, with its answer.

    Attributes:
        answer: a label, or a text.
        row: all its columns.
    """

    answer: str
    row: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, kw_only=True)
class Desk:
    """See the top of this file.

    Attributes:
        pool: the rows that may be shown.
        words: label -> the word that is written for it; empty where answers are texts of any kind.
        before: stands before everything, such as an instruction.
        seed: names the draws.
        count: tokens of a text, as a prompt.
        size: tokens of a text that goes on from a prompt; None, as `count` has it.
        limit: tokens that the model has positions for; None where nobody knows.
        find: retriever over the pool's texts by its name, such as "bm25" or a model.
    """

    pool: tuple[Shown, ...]
    words: Mapping[str, str]
    template: str
    before: str = ""
    seed: int = 0
    count: Callable[[str], int] = len
    size: Callable[[str], int] | None = None
    limit: int | None = None
    find: Callable[[str], Retriever] | None = None

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of the task."""
        return tuple(self.words)

    @property
    def options(self) -> tuple[str, ...]:
        """What may go on from a prompt, a word of each label."""
        return tuple(f"{self.blank}{word}" for word in self.words.values())

    @property
    def blank(self) -> str:
        """What stands between the prompt's end and an answer."""
        head = self.template.partition("{label}")[0]
        return head[len(head.rstrip(" ")) :]

    def prompt(self, query: Query, shots: Sequence[Shown] = (), head: str | None = None) -> str:
        """The whole prompt of a query.

        Args:
            head: stands before everything, in the place of the desk's own.
        """
        shown = [self.filled(shot, self.word_of(shot.answer)) for shot in shots]
        first = self.before if head is None else head
        return GAP.join([*([first] if first else []), *shown, self.asked(query)])

    def filled(self, row: Query, answer: str) -> str:
        """The template with a row and its answer."""
        fields = {"text": row.texts[0], "pair": row.texts[-1], "label": answer}
        return FIELD.sub(lambda found: fields[found.group(1)], self.template)

    def asked(self, row: Query) -> str:
        """The template with a row, up to its answer."""
        fields = {"text": row.texts[0], "pair": row.texts[-1]}
        head = self.template.partition("{label}")[0].rstrip(" ")
        return FIELD.sub(lambda found: fields[found.group(1)], head)

    def word_of(self, answer: str) -> str:
        """How an answer is written."""
        return self.words.get(answer, answer)

    def generator(self, *stream: int | str) -> np.random.Generator:
        """Draws that are named by the seed and these words."""
        return np.random.Generator(np.random.Philox(key(self.seed, "asking", *stream)))

    def likeliest(self, scores: Sequence[float], **more: Any) -> Answer:
        """The label with the highest of these log-scores, and the share of each; of equal ones the first."""
        top = max(scores)
        masses = [math.exp(score - top) for score in scores]
        shares = {name: mass / sum(masses) for name, mass in zip(self.labels, masses, strict=True)}
        return Answer(said=self.labels[scores.index(top)], shares=shares, **more)


def check_template(template: str, pair: bool) -> None:
    """Refuse a template that cannot ask.

    Raises:
        ConfigError: it lacks {text}, does not end with {label}, or has a field that is none.
    """
    found = FIELD.findall(template)
    known = ("text", "pair", "label")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise ConfigError(
            f"--template: {{{unknown[0]}}} is none of {{text}}, {{pair}} and {{label}}.{near(unknown[0], known)}"
        )
    if found.count("label") != 1 or not template.rstrip().endswith("{label}"):
        raise ConfigError(
            f"--template {template!r}: the answer goes on from its end, so it must end with {{label}}, as in "
            f"{LABELLED!r}."
        )
    if "text" not in found or ("pair" in found) != pair:
        lacks = "{text}" if "text" not in found else "{pair}, the second text of a row" if pair else ""
        raise ConfigError(
            f"--template {template!r}: "
            + (f"put {lacks} into it." if lacks else "it holds {pair}, and the rows have one text. Leave it out.")
        )

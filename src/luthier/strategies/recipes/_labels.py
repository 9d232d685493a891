"""A model says which of two answers is better: each pair is shown in both orders, so that no place is preferred."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core import ConfigError
from luthier.training.recipe import Asked

__all__ = ["QUESTION", "Label", "asked", "filled", "labels_of", "prompt_text", "question_of", "version", "words_of"]

QUESTION = """\
Two answers to one request follow. Say which serves the person better: which is more helpful, truer, and does less harm.

Request:
{prompt}

Answer {one}:
{first}

Answer {two}:
{second}

Say {one} or {two}, and nothing else. The better answer is"""

FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class Label:
    """What a labeller says of the answers a and b.

    Attributes:
        share: how far it is for a: the mean of both orders. Of (b, a) it is 1 - share to the bit.
        shown_first, shown_second: how likely it names a where that is shown first, and second.
        verdict: "a", "b", or "tie".
        swayed: the order alone decides which it names.
    """

    share: float
    shown_first: float
    shown_second: float
    verdict: str
    swayed: bool


def question_of(path: str, fields: Sequence[str] = ("prompt", "first", "second"), usual: str = QUESTION) -> str:
    """The text of a file, or the usual question where none is named.

    Raises:
        ConfigError: it cannot be read, or lacks a field.
    """
    if not path:
        return usual
    try:
        text = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as the question ({error}). Give a text file in UTF-8.") from error
    lacks = [name for name in fields if f"{{{name}}}" not in text]
    if lacks:
        raise ConfigError(
            f"{path}: the question has no {{{lacks[0]}}}. It must hold {', '.join(f'{{{f}}}' for f in fields)}, where "
            "the row's texts are put."
        )
    return text


def words_of(words: str) -> tuple[str, str]:
    """The two answers of a labeller, from "1, 2".

    Raises:
        ConfigError: not two different words.
    """
    found = [word.strip() for word in words.split(",")]
    if len(found) != 2 or not all(found) or found[0] == found[1]:
        raise ConfigError(f"words is {words!r}; give the two words by which answers are named, as in words=1,2.")
    return found[0], found[1]


def filled(question: str, values: Mapping[str, str]) -> str:
    """The question with texts in its fields; what stands in braces in those texts stays."""
    return FIELD.sub(lambda m: values.get(m.group(1), m.group(0)), question)


def version(*texts: str) -> str:
    """Of what is asked: labels of another version are others."""
    return hashlib.sha256("\x1f".join(texts).encode()).hexdigest()[:16]


def prompt_text(messages: Sequence[Mapping[str, Any]]) -> str:
    """What was asked, as one text: of several turns each with who says it."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


def asked(text: str) -> list[dict[str, str]]:
    """One question as a conversation."""
    return [{"role": "user", "content": text}]


def labels_of(
    labeller: Asked, question: str, pairs: Sequence[tuple[str, str, str]], words: tuple[str, str], tie: float,
    further: Sequence[Mapping[str, str]] | None = None,
) -> list[Label]:  # fmt: skip
    """Of each (prompt, a, b) how far the labeller is for a.

    Args:
        tie: shares that are no farther than this from a half are a tie.
        further: more fields of the question for each pair.
    """
    questions = []
    for number, (prompt, a, b) in enumerate(pairs):
        own = {"prompt": prompt, "one": words[0], "two": words[1], **(further[number] if further else {})}
        for first, second in ((a, b), (b, a)):
            questions.append(asked(filled(question, {**own, "first": first, "second": second})))
    if not questions:
        return []
    found = labeller.chances(questions, words)
    labels = []
    for k in range(len(pairs)):
        ahead, behind = float(found[2 * k, 0]), float(found[2 * k + 1, 0])  # the first shown is named: a, then b
        # A multiple of 2^-53, so that both shares of a pair are exact numbers that add up to 1.
        apart = float(np.rint((ahead - behind) / 2 * 2.0**53) * 2.0**-53)
        share = 0.5 + apart
        verdict = "tie" if abs(apart) <= tie else "a" if apart > 0 else "b"
        swayed = (ahead > 0.5) == (behind > 0.5)  # the same place is named, whatever stands there
        labels.append(Label(share=share, shown_first=ahead, shown_second=1.0 - behind, verdict=verdict, swayed=swayed))
    return labels

"""Tokens by which a model says when to look something up, and how good what it found and wrote is.

    asked q -> [Retrieval]              <paragraph>d</paragraph> -> [Relevant] answer [Fully supported] [Utility:5]
    asked q -> [No Retrieval] answer [Utility:4]

What the model says are its own turns of a chat; a paragraph comes from outside, so it is the other's turn and carries
no loss. The tokens are those of arXiv:2310.11511.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from luthier.core import DataError, near
from luthier.data.chat import Message
from luthier.data.columns import is_blank

__all__ = ["RELEVANT", "RETRIEVE", "SUPPORT", "TOKENS", "UTILITY", "Judged", "chat_of", "paragraph", "read_judged"]

RETRIEVE = ("[Retrieval]", "[No Retrieval]")
RELEVANT = ("[Relevant]", "[Irrelevant]")
SUPPORT = ("[Fully supported]", "[Partially supported]", "[No support / Contradictory]")
UTILITY = tuple(f"[Utility:{n}]" for n in range(1, 6))
TOKENS = (*RETRIEVE, *RELEVANT, *SUPPORT, *UTILITY, "<paragraph>", "</paragraph>")

WORDS = {"support": dict(zip(("full", "partial", "none"), SUPPORT, strict=True))}


@dataclass(frozen=True)
class Judged:
    """A question and its answer, and what was judged of them; no document where none was looked up."""

    question: str
    answer: str
    document: str | None
    relevant: bool
    support: str
    utility: int


def read_judged(row: Mapping[str, Any], place: str, question: str, answer: str, document: str | None) -> Judged:
    """What a row says of its question, its answer and the document.

    Args:
        document: the text of the one that was looked up, if one was.

    Raises:
        DataError: a judgement is not there, or is none; with place and field.
    """
    rank = row.get("utility")
    if isinstance(rank, bool) or str(rank).strip().removesuffix(".0") not in ("1", "2", "3", "4", "5"):
        raise DataError(f"{place}: field 'utility' is {rank!r}; it must be a whole number from 1 to 5.")
    utility = int(str(rank).strip()[0])
    if document is None:
        return Judged(question, answer, None, False, "", utility)
    told = str(row.get("relevant")).lower()
    if told not in ("true", "false", "1", "0"):
        raise DataError(f"{place}: field 'relevant' is {row.get('relevant')!r}; it must be true or false.")
    relevant, support = told in ("true", "1"), row.get("support")
    if is_blank(support) and not relevant:
        return Judged(question, answer, document, False, "", utility)
    if support not in WORDS["support"]:
        known = tuple(WORDS["support"])
        raise DataError(
            f"{place}: field 'support' is {support!r}; it must be {', '.join(known)}.{near(str(support), known)}"
        )
    return Judged(question, answer, document, relevant, WORDS["support"][str(support)], utility)


def paragraph(text: str) -> str:
    """What was looked up, between its marks."""
    return f"<paragraph>{text}</paragraph>"


def chat_of(judged: Judged) -> list[Message]:
    """The row as a chat that the model learns its own turns of."""
    rank = UTILITY[judged.utility - 1]
    asked: Message = {"role": "user", "content": judged.question}
    if judged.document is None:
        return [asked, {"role": "assistant", "content": f"{RETRIEVE[1]} {judged.answer} {rank}"}]
    word = RELEVANT[0 if judged.relevant else 1]
    said = " ".join(part for part in (word, judged.answer, judged.support, rank) if part)
    return [
        asked,
        {"role": "assistant", "content": RETRIEVE[0]},
        {"role": "user", "content": paragraph(judged.document)},
        {"role": "assistant", "content": said},
    ]

"""What answers requests, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from luthier.asking.requests import Score, Scored, Text, Write

__all__ = ["Cost", "Machine", "tokens_of"]


@dataclass(kw_only=True)
class Cost:
    """What requests cost.

    Attributes:
        requests: that were answered; one that another query asked too is answered once.
        read: tokens of their prompts and options.
        computed: of those read, the tokens that went through the model: what requests share is computed once. What an
            endpoint computes is not known; there it is what was sent.
        written: tokens that were written.
        seconds: between a request and its reply.
    """

    requests: int = 0
    read: int = 0
    computed: int = 0
    written: int = 0
    seconds: float = 0.0


class Machine(Protocol):
    """A model that answers requests.

    Attributes:
        scores, writes: which requests it can answer.
        limit: tokens that it has positions for; None where nobody knows.
        wave: queries that are asked about side by side.
        cost: since it was made.
        reads: how prompts are laid before the model, where that is not as they are; part of the digest of each.
        said: the same for the eye.
    """

    name: str
    scores: bool
    writes: bool
    limit: int | None
    wave: int
    cost: Cost

    @property
    def reads(self) -> str: ...
    @property
    def said(self) -> str: ...

    def count(self, text: str) -> int:
        """Tokens of a text, as a prompt: with what is laid around it."""

    def size(self, text: str) -> int:
        """Tokens of a text that goes on from a prompt."""

    def score(self, requests: Sequence[Score]) -> list[Scored]:
        """One reply to each."""

    def write(self, requests: Sequence[Write], names: Sequence[tuple[int, ...]]) -> list[tuple[Text, ...]]:
        """One reply to each.

        Args:
            names: of each request a seed for each of its texts.
        """

    def forget(self) -> None:
        """Drop what was kept of earlier prompts, so that what comes next costs what it costs alone."""


def tokens_of(text: str) -> int:
    """Tokens of a text where no tokenizer is at hand: a quarter of its letters, which is near for English."""
    return -(-len(text.encode()) // 4)

"""Which texts stand nearest to a query: by the words that they share (BM25), or by vectors of theirs.

    words      Words(texts)             BM25 as Lucene computes it, by the package bm25s
    vectors    Vectors(texts, embed)    cosine of what `embed` makes of texts: see `luthier.workflow.sentence_vectors`

Both give a score for each text. `nearest` orders them: of equal scores the earlier text is first, so that the same
query always finds the same.

Paper: Robertson and Zaragoza 2009 (BM25); arXiv:2101.06804 (demonstrations by nearness).
"""

import re
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, DataError, UsageError

__all__ = ["Embed", "Retriever", "Vectors", "Words", "nearest", "words_in"]

Scores = NDArray[np.float64]
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""texts -> (texts, width)"""

_TIE = 6
"""Decimals of a score that count: a vector in another batch differs behind them."""


class Retriever(Protocol):
    """Scores of a fixed number of texts for a query; higher is nearer."""

    def __len__(self) -> int: ...

    def scores(self, queries: Sequence[str]) -> Scores:
        """(queries, texts)"""


class Words:
    """BM25: shared words count, rare ones more, in long texts less.

    Args:
        texts: what may be found.
        k1: from how often on a word counts no more.
        b: how much a text's length takes off, from 0 to 1.

    Raises:
        DataError: no texts, or none has a word.
        UsageError: the package bm25s is not installed.

    >>> found = Words(["how tall is it", "who wrote it", "how far is the moon"])
    >>> nearest(found, "how far is the sun", 2)
    [2, 0]
    """

    def __init__(self, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> None:
        try:
            import bm25s
        except ImportError:
            raise UsageError(
                "finding texts by their words needs bm25s, which is not installed. pip install 'luthier[retrieval]', "
                "or find them by vectors."
            ) from None
        _check(texts)
        split = [words_in(text) for text in texts]
        if not any(split):
            raise DataError(f"none of the {len(texts)} texts has a word, so none can be found by words.")
        self._number = len(texts)
        self._index = bm25s.BM25(method="lucene", k1=k1, b=b, backend="numpy")
        self._index.index(split, show_progress=False)

    def __len__(self) -> int:
        return self._number

    def scores(self, queries: Sequence[str]) -> Scores:
        """(queries, texts); 0 where no word is shared."""
        found = np.zeros((len(queries), self._number))
        for row, query in zip(found, queries, strict=True):
            if words := words_in(query):
                row[:] = self._index.get_scores(words)
        return found


class Vectors:
    """The cosine between a query's vector and each text's. The texts are read once.

    Args:
        texts: what may be found.
        embed: what makes vectors of texts, all of one width.

    Raises:
        DataError: no texts, or a vector that is not finite.
    """

    def __init__(self, texts: Sequence[str], embed: Embed) -> None:
        _check(texts)
        self._embed = embed
        self._vectors = self._of(texts)  # (texts, width)

    def __len__(self) -> int:
        return len(self._vectors)

    def scores(self, queries: Sequence[str]) -> Scores:
        """(queries, texts), from -1 to 1; 0 where a vector is nothing."""
        return np.asarray(self._of(queries) @ self._vectors.T) if queries else np.zeros((0, len(self)))

    def _of(self, texts: Sequence[str]) -> Scores:
        found = np.asarray(self._embed(texts), dtype=np.float64)
        assert found.shape[0] == len(texts), "one vector for each text"
        if not np.isfinite(found).all():
            number = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
            raise DataError(f"text {texts[number][:60]!r}: its vector is not finite. Use another encoder.")
        lengths = np.linalg.norm(found, axis=1, keepdims=True)
        unit: Scores = np.divide(found, lengths, out=np.zeros_like(found), where=lengths > 0)
        return unit


def nearest(of: Retriever, query: str, k: int, without: Collection[int] = ()) -> list[int]:
    """Numbers of the k texts nearest to a query, the nearest first; of equal ones the earlier.

    Args:
        without: numbers of texts that may not be found, such as the query itself.

    Raises:
        ConfigError: fewer texts than k.
    """
    if not 0 <= k <= len(of) - len(set(without)):
        raise ConfigError(f"{k} texts are asked for, and there are {len(of) - len(set(without))}. Ask for fewer.")
    scores = np.round(of.scores([query])[0], _TIE)
    order = np.argsort(-scores, kind="stable")
    left_out = set(without)
    return [int(number) for number in order if int(number) not in left_out][:k]


def words_in(text: str) -> list[str]:
    """Letters and digits in a row, in small letters.

    >>> words_in("How far is the Moon?")
    ['how', 'far', 'is', 'the', 'moon']
    """
    return re.findall(r"\w+", text.lower())


def _check(texts: Sequence[str]) -> None:
    if not texts:
        raise DataError("there are no texts to find anything in. Give at least one.")

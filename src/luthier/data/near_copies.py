"""Which texts are near copies of one another: those that differ in case, blanks, digits or punctuation only."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["clusters", "skeleton"]


def clusters(texts: Sequence[str]) -> NDArray[np.int64]:
    """Rows whose texts differ in case, blanks, digits or punctuation only are near copies.

    Returns:
        (texts,) the same number for near copies, counted from 0.
    """
    known: dict[str, int] = {}
    return np.array([known.setdefault(skeleton(text), len(known)) for text in texts], dtype=np.int64)


def skeleton(text: str) -> str:
    """What near copies have in common.

    >>> skeleton("Flight BA 117 is late!") == skeleton("flight ba 4: is late")
    True
    """
    return re.sub(r"[\W_]+", " ", re.sub(r"\d+", "0", text.lower())).strip() or text

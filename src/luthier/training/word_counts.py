"""What words alone tell: TF-IDF with logistic regression, the baseline that a tuned model has to beat.

It costs a second or two and needs scikit-learn (the `metrics` extra); without it, and above a size, it is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["FEWEST_ROWS", "answers_by_words"]

FEWEST_ROWS = 100
"""To learn from; of fewer, a baseline says nothing."""
MOST_WORK = 12_000_000
"""Letters of all training texts times classes. At this size and the next one it takes 1.5 seconds on one core."""
MOST_ROWS = 25_000
"""To learn from; more take longer than a baseline should."""


def answers_by_words(
    learnt: Sequence[str], targets: NDArray[np.int64], asked: Sequence[str]
) -> NDArray[np.int64] | None:
    """The class of each text in `asked`, learnt from the texts and classes of the training rows.

    Returns:
        None where it would take long, where there is too little to learn from, or where scikit-learn is not installed.
    """
    n_classes = len(np.unique(targets))
    letters = sum(len(text) for text in learnt)
    if not FEWEST_ROWS <= len(learnt) <= MOST_ROWS or n_classes < 2 or not asked or letters * n_classes > MOST_WORK:
        return None
    if importlib.util.find_spec("sklearn") is None:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    # A token is any run of letters and digits: the usual pattern drops words of one letter, all there is in some texts.
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", ngram_range=(1, 2), sublinear_tf=True)
    try:
        counted = words.fit_transform(learnt)
    except ValueError:  # not one word in all texts
        return None
    one = LogisticRegression(C=10.0, solver="liblinear", random_state=0)
    model = one if n_classes == 2 else OneVsRestClassifier(one)
    return np.asarray(model.fit(counted, targets).predict(words.transform(asked)), dtype=np.int64)

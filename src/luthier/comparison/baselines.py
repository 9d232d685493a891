"""What any method has to beat: one answer for every row, and word counts with logistic regression."""

import importlib.util
import warnings
from collections import Counter
from collections.abc import Sequence

__all__ = ["majority", "word_counts"]

MOST_ROWS = 50_000


def majority(learnt: Sequence[str]) -> str:
    """The commonest label of the training rows; of equals the first in the alphabet."""
    counts = Counter(learnt)
    return min(counts, key=lambda name: (-counts[name], name))


def word_counts(texts: Sequence[str], labels: Sequence[str], asked: Sequence[str]) -> list[str] | None:
    """Answers of logistic regression on TF-IDF of words and pairs of words.

    Returns:
        None where scikit-learn is not installed, there are too many rows, or only one label.
    """
    if importlib.util.find_spec("sklearn") is None or len(texts) > MOST_ROWS or len(set(labels)) < 2:
        return None
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    count = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    try:
        seen = count.fit_transform(texts)
    except ValueError:  # no words at all
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LogisticRegression(C=10.0, max_iter=1000).fit(seen, labels)
    return [str(v) for v in model.predict(count.transform(asked))]

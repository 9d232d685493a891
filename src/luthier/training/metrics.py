"""The scores people expect for each task. Those of generated text need rouge-score and sacrebleu (the `metrics` extra),
which are imported where they are used.
"""

import importlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from luthier.core import UnknownName, UsageError, near

__all__ = ["METRICS", "Metric", "better", "of_judged", "of_pairs", "of_rewards", "perplexity", "score", "spans_of"]

Function = Callable[[Sequence[Any], Sequence[Any]], float]


@dataclass(frozen=True)
class Metric:
    """A score of predictions against what was wanted.

    `function` takes (predictions, references), one of each for each row, and is `None` for the scores that the loop
    has already added up ("loss", "perplexity", "token_accuracy" of a language model).
    """

    function: Function | None
    higher_is_better: bool
    meaning: str


def better(name: str, new: float, old: float | None) -> bool:
    """Whether `new` is a better value of the score `name` than `old`. Nothing non-finite is better than anything."""
    if not math.isfinite(new):
        return False
    if old is None or not math.isfinite(old):
        return True
    return new > old if METRICS[name].higher_is_better else new < old


def score(names: Sequence[str], predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Compute several scores.

    Args:
        names: of METRICS; those without a function are left to the caller.
        predictions, references: what `Task.decode` gives, row by row.

    Raises:
        UnknownName: no score of that name.
        UsageError: a library is missing; says how to get it.
        ValueError: no rows, or not as many predictions as references.
    """
    if len(predictions) != len(references) or not len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    results = {}
    for name in names:
        if name not in METRICS:
            raise UnknownName(
                f"No score is called {name!r}.{near(name, list(METRICS))} There are {', '.join(METRICS)}."
            )
        function = METRICS[name].function
        if function is not None:
            results[name] = float(function(predictions, references))
    return results


def perplexity(loss: float) -> float:
    """exp of the mean loss of a token, in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def of_pairs(rewards: Any) -> dict[str, float]:
    """The scores of pairs of answers, the better one first.

    A tie is half right: where nothing has been learnt, both rewards are 0, which says nothing of either answer.

    >>> of_pairs(np.array([[2.0, 1.0], [0.5, 0.5]]))
    {'pair_accuracy': 0.75, 'margin': 0.5, 'chosen_reward': 1.25}

    Args:
        rewards: (pairs, 2).
    """
    margins = rewards[:, 0].astype(np.float64) - rewards[:, 1]
    right = (margins > 0) + 0.5 * (margins == 0)
    return {
        "pair_accuracy": float(right.mean()),
        "margin": float(margins.mean()),
        "chosen_reward": float(rewards[:, 0].astype(np.float64).mean()),
    }


def of_judged(rewards: Any, liked: Any) -> dict[str, float]:
    """The scores of single answers, liked or not.

    >>> of_judged(np.array([2.0, 0.0, 1.0]), np.array([True, False, False]))
    {'ranked': 1.0, 'reward_gap': 1.5}

    Where all are liked, or none, there is nothing to tell apart: 0.5 and 0.

    Args:
        rewards, liked: (answers,).
    """
    good, bad = rewards[liked].astype(np.float64), rewards[~liked].astype(np.float64)
    if not len(good) or not len(bad):
        return {"ranked": 0.5, "reward_gap": 0.0}
    below, upto = (np.searchsorted(np.sort(bad), good, side=side) for side in ("left", "right"))
    return {
        "ranked": float((below + upto).mean() / (2 * len(bad))),
        "reward_gap": float(good.mean() - bad.mean()),
    }


def of_rewards(rewards: Any) -> dict[str, float]:
    """The scores of answers that were written and rewarded.

    >>> of_rewards(np.array([[1.0, 0.0, 7], [0.0, 0.0, 9]]))
    {'reward': 0.5, 'base_reward': 0.0, 'answer_tokens': 8.0}

    Args:
        rewards: (prompts, 3), the reward of each answer, that of the base's own answer, and the answer's tokens.
    """
    means = rewards.astype(np.float64).mean(0).tolist()
    return dict(zip(("reward", "base_reward", "answer_tokens"), means, strict=True))


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"This score needs {package}, which is not installed. Run: pip install 'luthier[metrics]'"
        ) from error


# --- one label for each row -------------------------------------------------------------------------------------------


def _accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    right: int = sum(p == r for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def _macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean F1 of the classes that occur among references or predictions; one that is never predicted counts 0."""
    several = isinstance(references[0], list)
    right, said, wanted = (
        _counts(predictions, references) if several else _counts(_alone(predictions), _alone(references))
    )
    names = said.keys() | wanted.keys()
    return sum(2 * right[n] / (said[n] + wanted[n]) for n in names) / len(names) if names else 0.0


def _mcc(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Matthews' correlation, in Gorodkin's form for several classes; 0 where either side has one class only."""
    n = len(references)
    right = sum(p == r for p, r in zip(predictions, references, strict=True))
    said, wanted = Counter(predictions), Counter(references)
    together = sum(said[name] * wanted[name] for name in said)
    spread = (n * n - sum(v * v for v in said.values())) * (n * n - sum(v * v for v in wanted.values()))
    return (right * n - together) / math.sqrt(spread) if spread else 0.0


def _alone(labels: Sequence[Any]) -> list[list[Any]]:
    return [[label] for label in labels]


def _counts(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[Counter[Any], Counter[Any], Counter[Any]]:
    """How often each label was rightly predicted, predicted, and wanted; a label counts once a row."""
    right: Counter[Any] = Counter()
    said: Counter[Any] = Counter()
    wanted: Counter[Any] = Counter()
    for p, r in zip(predictions, references, strict=True):
        mine, theirs = set(p), set(r)
        right.update(mine & theirs)
        said.update(mine)
        wanted.update(theirs)
    return right, said, wanted


# --- several labels for each row --------------------------------------------------------------------------------------


def _micro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    right, said, wanted = _counts(predictions, references)
    total = said.total() + wanted.total()
    return 2 * right.total() / total if total else 0.0


def _exact_match(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of rows that agree: sets of labels as sets, texts after white space at the ends is gone."""
    right: int = sum(_plain_form(p) == _plain_form(r) for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def _plain_form(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else frozenset(value) if isinstance(value, list) else value


# --- numbers ----------------------------------------------------------------------------------------------------------


def _pearson(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Linear correlation. Without spread there is none; 0 says "learnt nothing", which a nan would hide."""
    x, y = (np.asarray(values, dtype=np.float64) for values in (predictions, references))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt(x @ x) * np.sqrt(y @ y))
    if len(set(predictions)) < 2 or len(set(references)) < 2 or not spread > 0 or not math.isfinite(spread):
        return 0.0
    return float(np.clip(x @ y / spread, -1.0, 1.0))


def _spearman(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return _pearson(_ranks(predictions), _ranks(references))


def _ranks(values: Sequence[Any]) -> list[float]:
    """Ranks from 1; equal values share the mean of theirs."""
    found, where, counts = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True, return_counts=True)
    del found
    last = np.cumsum(counts)
    return [float(v) for v in (last - (counts - 1) / 2)[where]]


def _mse(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    return float(sum((p - r) ** 2 for p, r in zip(predictions, references, strict=True)) / len(references))


# --- tags: one list for each row --------------------------------------------------------------------------------------


def _token_accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    pairs = _flat_pairs(predictions, references)
    right: int = sum(p == r for p, r in pairs)
    return right / max(1, len(pairs))


def _token_macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    pairs = _flat_pairs(predictions, references)
    return _macro_f1([p for p, _ in pairs], [r for _, r in pairs]) if pairs else 0.0


def _flat_pairs(predictions: Sequence[Any], references: Sequence[Any]) -> list[tuple[Any, Any]]:
    return [pair for p, r in zip(predictions, references, strict=True) for pair in zip(p, r, strict=True)]


def spans_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The spans (kind, first word, past-last word) that B-/I-/O tags describe.

    An I- that follows neither B- nor I- of its kind begins a span, as in the CoNLL scorer.

    >>> sorted(spans_of(["B-LOC", "I-LOC", "O", "I-PER", "B-PER"]))
    [('LOC', 0, 2), ('PER', 3, 4), ('PER', 4, 5)]
    """
    spans: set[tuple[str, int, int]] = set()
    kind, first = "", 0
    for i, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            spans.add((kind, first, i))
            kind = ""
        if mark in ("B", "I") and not kind:
            kind, first = name, i
    return spans


def _span_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Micro F1 of whole spans; 1 where there is nothing to find and nothing was found."""
    right = found = wanted = 0
    for p, r in zip(predictions, references, strict=True):
        mine, theirs = spans_of(p), spans_of(r)
        right += len(mine & theirs)
        found += len(mine)
        wanted += len(theirs)
    return 2 * right / (found + wanted) if found + wanted else 1.0


# --- texts ------------------------------------------------------------------------------------------------------------


def _token_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean F1 of the words of two texts, each as often as it stands there, whatever their order and their case."""
    return sum(map(_shared_words, predictions, references)) / len(references)


def _shared_words(one: str, other: str) -> float:
    a, b = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    if not a or not b:
        return float(a == b)
    return 2 * (a & b).total() / (a.total() + b.total())


def _rouge_l(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean F-measure of the longest common subsequence, stemmed, 0 to 1."""
    module = _library("rouge_score.rouge_scorer", "rouge-score")
    scorer = module.RougeScorer(["rougeL"], use_stemmer=True)
    values = [scorer.score(r, p)["rougeL"].fmeasure for p, r in zip(predictions, references, strict=True)]
    return float(sum(values) / len(values))


def _bleu(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Corpus BLEU of sacrebleu with its own tokeniser, 0 to 100."""
    return float(_library("sacrebleu", "sacrebleu").corpus_bleu(list(predictions), [list(references)]).score)


METRICS: dict[str, Metric] = {
    "loss": Metric(None, False, "mean loss of a target, in nats (of a row: mean squared error for regression)"),
    "perplexity": Metric(None, False, "exp of the mean loss of a token"),
    "accuracy": Metric(_accuracy, True, "share of rows with the right class"),
    "macro_f1": Metric(_macro_f1, True, "mean F1 of the classes, each counted alike"),
    "micro_f1": Metric(_micro_f1, True, "F1 over all labels of all rows"),
    "mcc": Metric(_mcc, True, "Matthews' correlation, -1 to 1"),
    "exact_match": Metric(_exact_match, True, "share of rows that are right as a whole"),
    "pearson": Metric(_pearson, True, "linear correlation, -1 to 1"),
    "spearman": Metric(_spearman, True, "rank correlation, -1 to 1"),
    "mse": Metric(_mse, False, "mean squared error"),
    "token_accuracy": Metric(_token_accuracy, True, "share of tokens with the right tag, or guessed right"),
    "token_macro_f1": Metric(_token_macro_f1, True, "mean F1 of the tags over all tokens"),
    "span_f1": Metric(_span_f1, True, "F1 of whole spans of B-/I-/O tags"),
    "pair_accuracy": Metric(None, True, "share of pairs whose better answer has the higher reward"),
    "margin": Metric(None, True, "mean difference of the rewards of the better and the worse answer"),
    "chosen_reward": Metric(None, True, "mean reward of the better answers: below 0, they became less likely"),
    "ranked": Metric(None, True, "how often an answer that is liked has a higher reward than one that is not"),
    "reward": Metric(None, True, "mean reward of the answers, each token the likeliest"),
    "base_reward": Metric(None, True, "the same of what the base answers"),
    "answer_tokens": Metric(None, False, "tokens of an answer"),
    "reward_gap": Metric(None, True, "mean reward of the answers that are liked, less that of those that are not"),
    "forgetting": Metric(None, False, "rise of the loss of a token of a general text over the base's, in nats"),
    "token_f1": Metric(_token_f1, True, "mean F1 of the words of generated text, 0 to 1"),
    "rouge_l": Metric(_rouge_l, True, "ROUGE-L of generated text, 0 to 1"),
    "bleu": Metric(_bleu, True, "BLEU of generated text, 0 to 100"),
}

"""The scores people expect for each task, through scikit-learn, SciPy, rouge-score and sacrebleu.

Those libraries are imported where they are used: the ones of the `metrics` extra may be missing.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from luthier.core import UnknownName, UsageError, near

__all__ = ["METRICS", "Metric", "better", "perplexity", "score", "spans_of"]

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


def _library(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"This score needs {package}, which is not installed. Run: pip install 'luthier[metrics]'"
        ) from error


def _sklearn() -> Any:
    return _library("sklearn.metrics", "scikit-learn")


# --- one label for each row -------------------------------------------------------------------------------------------


def _accuracy(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    right: int = sum(p == r for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def _macro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Mean F1 of the classes that occur among references or predictions; one that is never predicted counts 0."""
    if isinstance(references[0], list):
        p, r = _indicators(predictions, references)
        return float(_sklearn().f1_score(r, p, average="macro", zero_division=0))
    return float(_sklearn().f1_score(list(references), list(predictions), average="macro", zero_division=0))


def _mcc(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Matthews' correlation; 0 where either side has one class only."""
    return float(_sklearn().matthews_corrcoef(list(references), list(predictions)))


# --- several labels for each row --------------------------------------------------------------------------------------


def _indicators(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[Any, Any]:
    preprocessing = _library("sklearn.preprocessing", "scikit-learn")
    names = sorted({name for row in [*predictions, *references] for name in row})
    maker = preprocessing.MultiLabelBinarizer(classes=names).fit([names])
    return maker.transform(predictions), maker.transform(references)


def _micro_f1(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    p, r = _indicators(predictions, references)
    return float(_sklearn().f1_score(r, p, average="micro", zero_division=0))


def _exact_match(predictions: Sequence[Any], references: Sequence[Any]) -> float:
    """Share of rows that agree: sets of labels as sets, texts after white space at the ends is gone."""
    right: int = sum(_plain_form(p) == _plain_form(r) for p, r in zip(predictions, references, strict=True))
    return right / len(references)


def _plain_form(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else frozenset(value) if isinstance(value, list) else value


# --- numbers ----------------------------------------------------------------------------------------------------------


def _correlation(kind: str) -> Function:
    def function(predictions: Sequence[Any], references: Sequence[Any]) -> float:
        stats = _library("scipy.stats", "SciPy")
        # Without spread there is no correlation; 0 says "learnt nothing", which a nan would hide from comparisons.
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of nearly constant input: the number is what we report
            value = float(getattr(stats, kind)(list(predictions), list(references)).statistic)
        return value if math.isfinite(value) else 0.0

    return function


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
    "pearson": Metric(_correlation("pearsonr"), True, "linear correlation, -1 to 1"),
    "spearman": Metric(_correlation("spearmanr"), True, "rank correlation, -1 to 1"),
    "mse": Metric(_mse, False, "mean squared error"),
    "token_accuracy": Metric(_token_accuracy, True, "share of tokens with the right tag, or guessed right"),
    "token_macro_f1": Metric(_token_macro_f1, True, "mean F1 of the tags over all tokens"),
    "span_f1": Metric(_span_f1, True, "F1 of whole spans of B-/I-/O tags"),
    "rouge_l": Metric(_rouge_l, True, "ROUGE-L of generated text, 0 to 1"),
    "bleu": Metric(_bleu, True, "BLEU of generated text, 0 to 100"),
}

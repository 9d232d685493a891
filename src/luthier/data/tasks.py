"""What is learnt: which head the model gets, which labels there are, which score counts, how outputs are read."""

import ast
import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, DataError, ModelError, UnknownName, near
from luthier.data.columns import Columns, cell, is_blank, label_name, reads_like_no_label
from luthier.data.rows import Table
from luthier.runs.spec import TASKS

__all__ = ["Task", "infer_task", "look_alikes"]

T = TypeVar("T")

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
}
METRICS = {
    "classification": ("accuracy", "macro_f1", "mcc", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
    "token_classification": ("token_macro_f1", "token_accuracy", "loss"),
    "spans": ("span_f1", "token_accuracy", "loss"),
    "causal_lm": ("loss", "perplexity", "token_accuracy"),
    "seq2seq": ("loss", "perplexity", "token_accuracy"),
}
GENERATED = ("rouge_l", "bleu", "exact_match")
"""Scores of generated text against the response: a run writes no text while it trains."""

MOST_COMPLAINTS = 10
SHOWN_CLASSES = 12
MOST_LIST_CHARS = 100_000

_COMMA_NUMBER = re.compile(r"[+-]?(\d+|\d{1,3}(\.\d{3})+)(,\d+)?")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task on one data set. Plain values only: it is stored with the tuning and read back for prediction."""

    name: str
    labels: tuple[str, ...] = ()
    """names of the classes or tags, in the order of the model's outputs"""
    multi_label: bool = False
    spans: bool = False
    """tags are B-/I-/O and are scored as spans"""
    written: Literal["", "decimal_comma", "indicators"] = ""
    """how labels stand in the rows where that is not plain: 3,5 for three and a half; one 0 or 1 for each label"""
    center: float = 0.0
    scale: float = 1.0
    """of a regression: the model learns (number - center) / scale; answers are in the unit of the rows"""
    thresholds: tuple[float, ...] = ()
    """of several labels, the probability from which each is answered; of two classes, that of the second; none: 0.5"""
    notes: tuple[str, ...] = ()
    """what was decided from the data, in sentences"""

    @property
    def auto_class(self) -> str:
        """The transformers class that loads a model with the right head."""
        return AUTO_CLASSES[self.name]

    @property
    def n_outputs(self) -> int | None:
        """Numbers that the head puts out, for a row or a token; `None` where it is the vocabulary."""
        return 1 if self.name == "regression" else len(self.labels) or None

    @property
    def problem_type(self) -> str | None:
        """What transformers calls the kind of loss of a sequence classification head."""
        if self.name == "classification":
            return "multi_label_classification" if self.multi_label else "single_label_classification"
        return "regression" if self.name == "regression" else None

    @property
    def has_thresholds(self) -> bool:
        """Whether each answer is a yes or no from some probability on: several labels, or two classes."""
        return self.name == "classification" and (self.multi_label or len(self.labels) == 2)

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names in `luthier.training.metrics`, the one that decides first."""
        kind = "multi_label" if self.multi_label else "spans" if self.spans else self.name
        return METRICS[kind]

    @property
    def headline(self) -> str:
        """The score that decides which evaluation is best."""
        return self.metrics[0]

    def check_metric(self, name: str) -> str:
        """Return `name` if a run of this task computes such a score.

        Raises:
            UnknownName: the task has none.
            ConfigError: it is of generated text.
        """
        if name in self.metrics:
            return name
        if name in GENERATED and self.name in ("causal_lm", "seq2seq"):
            raise ConfigError(
                f"eval.metric {name!r} is of generated text, and a run writes none while it trains. A run of task "
                f"{self.name} can select by {', '.join(self.metrics)}. For {name}, let the finished run answer "
                "the test rows (luthier predict) and compare."
            )
        known = list(self.metrics)
        raise UnknownName(f"task {self.name} has no score {name!r}.{near(name, known)} It has {', '.join(known)}.")

    def targets(self, table: Table, columns: Columns) -> NDArray[Any] | None:
        """One target for each row: class numbers (int64), 0 or 1 of each label (float32, (rows, labels)), or float32.

        `None` where targets are tokens or tags, which `encode` makes.

        Raises:
            DataError: a label that this task does not have, or no number where one is needed; names the rows.
        """
        if self.name == "regression":
            numbers = _numbers(table, columns, self.written == "decimal_comma")
            return ((numbers - self.center) / self.scale).astype(np.float32)
        if self.name != "classification":
            return None
        number = {name: i for i, name in enumerate(self.labels)}
        if self.written == "indicators":
            names = _indicated(table, columns, len(self.labels))
        elif self.multi_label:
            names = _label_lists(table, columns)
        else:
            names = [[n] for n in _label_names(table, columns)]
        _refuse_unknown(table, names, number)
        if self.multi_label:
            matrix = np.zeros((len(table), len(self.labels)), dtype=np.float32)
            for i, row in enumerate(names):
                matrix[i, [number[n] for n in row]] = 1.0
            return matrix
        return np.fromiter((number[row[0]] for row in names), dtype=np.int64, count=len(names))

    def decode(self, logits: NDArray[Any]) -> list[Any]:
        """Read outputs back.

        Args:
            logits: (rows, labels) of a classification, (rows, 1) or (rows,) of a regression, (tokens, labels) of tags.

        Returns:
            Label names, lists of label names (several labels), numbers, or one tag for each token.
        """
        if self.name == "regression":
            return [float(v) for v in self.in_unit(logits)]
        chosen = self.chosen(logits)
        if self.multi_label:
            return [[self.labels[i] for i in np.flatnonzero(row)] for row in chosen]
        return [self.labels[int(i)] for i in chosen]

    def chosen(self, logits: NDArray[Any]) -> NDArray[Any]:
        """What is answered, as numbers: the class of each row, or (rows, labels) of yes and no."""
        if self.thresholds:
            chances = self.probabilities(logits)
            if self.multi_label:
                return np.asarray(chances >= np.asarray(self.thresholds))
            return (chances[:, 1] >= self.thresholds[0]).astype(np.int64)
        return np.asarray(logits) > 0 if self.multi_label else np.argmax(logits, axis=-1)

    def in_unit(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Outputs or targets of a regression in the unit of the rows, flat."""
        return np.asarray(values, dtype=np.float64).reshape(-1) * self.scale + self.center

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """Softmax over the labels, or a sigmoid for each where a row may have several; same shape as `logits`."""
        x = np.asarray(logits, dtype=np.float64)
        if self.multi_label:
            return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.asarray(e / e.sum(axis=-1, keepdims=True))


def infer_task(
    train: Table, test: Table | None, columns: Columns, asked: str = "auto", model_config: Any = None
) -> Task:
    """Decide the task from the columns, the type of the labels and the model, and check that it can be learnt.

    Args:
        asked: one of `TASKS`; anything but "auto" is taken, if the data allow it.
        model_config: of transformers; tells encoders, decoders and encoder-decoders apart. `None` skips that check.

    Raises:
        UnknownName: no task is called `asked`.
        DataError: labels that cannot be learnt: one class only, labels in test that train lacks, no numbers where
            numbers are needed.
        ModelError: a model that has no head for the task.
    """
    if asked not in TASKS:
        raise UnknownName(f"No task is called {asked!r}.{near(asked, TASKS)} There are {', '.join(TASKS)}.")
    name = asked
    both = bool(getattr(model_config, "is_encoder_decoder", False))
    if asked == "auto":
        if columns.shape == "labelled":
            name = "regression" if _labels_are_measures(train, columns) else "classification"
        elif columns.shape == "tagged":
            name = "token_classification"
        elif columns.shape == "answered":
            name = "seq2seq" if both else "causal_lm"
        else:
            name = "causal_lm"
    _refuse_model(name, both, model_config)
    makers: dict[str, Callable[[Table, Columns], Task]] = {
        "classification": _classification,
        "regression": _regression,
        "token_classification": _token_classification,
        "causal_lm": lambda table, columns: Task(name="causal_lm"),
        "seq2seq": lambda table, columns: Task(name="seq2seq"),
    }
    task = makers[name](train, columns)
    if test is not None:
        _check_test(task, test, columns)
    return task


def _refuse_model(name: str, both: bool, model_config: Any) -> None:
    if model_config is None:
        return
    kind = getattr(model_config, "model_type", type(model_config).__name__)
    if name == "seq2seq" and not both:
        raise ModelError(
            f"task seq2seq needs an encoder-decoder such as T5 or BART; {kind!r} is none."
            " Use --task causal_lm with a decoder, or another model."
        )
    if name == "causal_lm" and both:
        raise ModelError(
            f"task causal_lm needs a decoder such as Llama or GPT-2; {kind!r} is an encoder-decoder."
            " Use --task seq2seq with prompt and response columns, or another model."
        )
    if name == "causal_lm" and _reads_both_ways(model_config):
        raise ModelError(
            f"task causal_lm needs a decoder such as Llama or GPT-2; {kind!r} is an encoder: it sees the tokens it"
            " should predict. Give a column of labels (--label), or use a decoder."
        )


def _reads_both_ways(model_config: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    masked = getattr(model_config, "model_type", "") in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return masked and not getattr(model_config, "is_decoder", False)


# --- labels -----------------------------------------------------------------------------------------------------------


def _filled(table: Table, columns: Columns) -> list[Any]:
    """The label cells; a missing one is an error that names its place."""
    column = columns.label
    assert column is not None
    if not all(column in row for row in table.rows):
        for i in range(len(table)):
            cell(table, i, column)  # names the first row that lacks it
    values = [row[column] for row in table.rows]
    empty = [table.places[i] for i, blank in enumerate(_each(values, is_blank)) if blank]
    if empty:
        raise DataError(
            f"{len(empty)} rows have no label in column {columns.label!r}: {_some(empty)}."
            " Fill the column in, or remove these rows."
        )
    return values


def _some(places: Sequence[str]) -> str:
    more = f" and {len(places) - MOST_COMPLAINTS} more" if len(places) > MOST_COMPLAINTS else ""
    return ", ".join(places[:MOST_COMPLAINTS]) + more


def _each(values: Sequence[Any], ask: Callable[[Any], T]) -> list[T]:
    """`ask` of every cell. Where all are text, it is asked once of each different one: labels are few, rows many."""
    if set(map(type, values)) == {str}:
        known = {value: ask(value) for value in set(values)}
        return [known[value] for value in values]
    return [ask(value) for value in values]


def _is_list(value: Any) -> bool:
    """Whether a cell holds several labels: a list, or (from a CSV) the JSON of one."""
    if isinstance(value, str):
        return _written_list(value) is not None
    return isinstance(value, list | tuple)


def _written_list(text: str) -> list[Any] | None:
    """The list that a cell of text holds, as JSON or as Python prints it; None where it holds none.

    Python's form is read as data: constants alone, and nothing is evaluated.
    """
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MOST_LIST_CHARS:
        return None  # also a name that begins with a bracket
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            return None
    return found if isinstance(found, list) else None


def _as_list(value: Any, place: str) -> list[str]:
    if isinstance(value, str):
        found = _written_list(value)
        if found is None:
            raise DataError(
                f'{place}: {value!r} is no list of labels. Write several labels as ["a", "b"] (JSON), none as [].'
            )
        value = found
    if not isinstance(value, list | tuple):
        raise DataError(f"{place}: the label {value!r} is one value where other rows have a list. Write it as a list.")
    return [label_name(v) for v in value]


def _label_names(table: Table, columns: Columns) -> list[str]:
    values = _filled(table, columns)
    lists = [table.places[i] for i, is_list in enumerate(_each(values, _is_list)) if is_list]
    if lists:
        raise DataError(
            f"{len(lists)} rows have a list in column {columns.label!r} where the task has one label a row:"
            f" {_some(lists)}. Write one label, or lists in the training rows too."
        )
    return _each(values, label_name)


def _label_lists(table: Table, columns: Columns) -> list[list[str]]:
    return [_as_list(v, p) for v, p in zip(_filled(table, columns), table.places, strict=True)]


def _sorted_names(names: set[str]) -> tuple[str, ...]:
    """Whole numbers by value ("2" before "10"), other names by the alphabet."""
    try:
        return tuple(sorted(names, key=int))
    except ValueError:
        return tuple(sorted(names))


def _as_number(value: Any, comma: bool = False) -> float | None:
    if isinstance(value, bool | list | tuple | dict):
        return None
    if comma and isinstance(value, str):
        value = value.replace(".", "").replace(",", ".")
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _written_as_fraction(value: Any) -> bool:
    """Whether a cell is a number with a fraction part by type: 4.0 and "4.0" are, 4 and "4" are not."""
    if isinstance(value, str):
        return any(mark in value for mark in ".eE")
    return isinstance(value, float)


def _has_decimal_commas(values: Sequence[Any]) -> bool:
    """Whether all labels are numbers as Germany writes them, 1.234,5 or 3,0, and one at least has a comma."""
    texts = [v.strip() for v in values if isinstance(v, str)]
    return len(texts) == len(values) and any("," in v for v in texts) and all(map(_COMMA_NUMBER.fullmatch, texts))


def _labels_are_measures(table: Table, columns: Columns) -> bool:
    """Regression, if every label is a number and one at least is no whole number; else classes."""
    values = _filled(table, columns)
    if _has_decimal_commas(values):
        return True
    return None not in _each(values, _as_number) and any(_each(values, _is_fraction))


def _is_fraction(value: Any) -> bool:
    number = _as_number(value)
    return number is not None and _written_as_fraction(value) and not number.is_integer()


def _indicators(values: Sequence[Any]) -> int:
    """How many labels there are where each row holds one 0 or 1 for each; 0 where rows hold something else."""
    widths: set[int] = set()
    seen: set[Any] = set()
    for value in values:
        found = _written_list(value) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or not all(isinstance(v, int | float) for v in found):
            return 0
        widths.add(len(found))
        seen.update(found)
    return widths.pop() if len(widths) == 1 and seen and seen <= {0, 1} and widths != {0} and widths != {1} else 0


def _indicated(table: Table, columns: Columns, n_labels: int) -> list[list[str]]:
    """Names of the labels whose place holds a 1: the number of the place."""
    rows = []
    for value, place in zip(_filled(table, columns), table.places, strict=True):
        found = _written_list(value) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or len(found) != n_labels or not set(found) <= {0, 1}:
            raise DataError(
                f"{place}: {value!r} should hold one 0 or 1 for each of {n_labels} labels, as the training rows do."
            )
        rows.append([str(at) for at, on in enumerate(found) if on])
    return rows


def _classification(table: Table, columns: Columns) -> Task:
    values = _filled(table, columns)
    if n_labels := _indicators(values):
        rows = _indicated(table, columns, n_labels)
        if all(len(row) == n_labels for row in rows):
            raise DataError(f"{table.source}: every row has every label: there is nothing to learn.")
        return Task(
            name="classification",
            labels=tuple(str(at) for at in range(n_labels)),
            multi_label=True,
            written="indicators",
            notes=(
                f"{n_labels} labels, several a row: each row holds a 0 or 1 for each, and they are called by their "
                "places, from 0",
            ),
        )
    if _is_list(values[0]):
        lists = _label_lists(table, columns)
        labels = _sorted_names({name for row in lists for name in row})
        if not labels:
            raise DataError(
                f"{table.source}: column {columns.label!r} holds only empty lists: there is nothing to learn."
                " Check that it is the column with the labels."
            )
        return Task(
            name="classification",
            labels=labels,
            multi_label=True,
            notes=(f"{len(labels)} labels, several a row: the labels are lists",),
        )
    names = _label_names(table, columns)
    counts = Counter(names)
    labels = _sorted_names(set(counts))
    if len(labels) == 1:
        raise DataError(
            f"{table.source}: all {len(table)} labels in column {columns.label!r} are {labels[0]!r}: with one class"
            " there is nothing to learn. Add rows of another class, or name another column with --label."
        )
    all_numbers = all(_as_number(v) is not None for v in values)
    once = sum(count == 1 for count in counts.values())
    if len(labels) > 20 and once > len(labels) / 2:
        advice = "--task regression" if all_numbers else "another column with --label"
        raise DataError(
            f"{table.source}: column {columns.label!r} has {len(labels)} different values in {len(table)} rows and"
            f" {once} of them occur once (such as {names[0]!r}): these are no classes. Use {advice}."
        )
    notes = [f"{len(labels)} classes", _counted(counts)]
    if all_numbers:
        notes = [
            f"{len(labels)} classes: the labels are whole numbers, read as classes (--task regression for measures)",
            _counted(counts),
        ]
    notes += _doubtful(counts)
    return Task(name="classification", labels=labels, notes=tuple(notes))


def _counted(counts: Counter[str]) -> str:
    """Rows of each class, the largest first."""
    shown = ", ".join(f"{name} {n}" for name, n in counts.most_common(SHOWN_CLASSES))
    left = len(counts) - SHOWN_CLASSES
    return f"rows of each class: {shown}" + (f", and {left} more classes" if left > 0 else "")


def _doubtful(counts: Counter[str]) -> list[str]:
    """What looks like a slip in the labels: classes that differ in case, blanks or a letter, and several in one."""
    notes = []
    groups = look_alikes(counts)
    if groups:
        shown = "; ".join(", ".join(f"{n!r} {counts[n]}" for n in group) for group in groups[:5])
        notes.append(f"labels that look alike are kept apart: {shown}. If they are one class, write it one way")
    none = [name for name in counts if reads_like_no_label(name)]
    if none:
        shown = ", ".join(f"{name!r} {counts[name]}" for name in none[:5])
        notes.append(f"learnt as a class, though it reads like none: {shown}. If it is none, empty these cells")
    joined = {name: {part.strip() for part in name.split(",")} for name in counts if "," in name}
    times = Counter(part for name in counts for part in joined.get(name, {name}))
    several = next((name for name, parts in joined.items() if any(times[part] > 1 for part in parts)), None)
    if several is not None:
        notes.append(
            f"labels such as {several!r} are read as one class each. If they are several labels of a row, write them "
            f"as a list: {json.dumps(sorted(joined[several]))}"
        )
    return notes


def look_alikes(counts: Mapping[str, int]) -> list[list[str]]:
    """Classes that may be one: they differ in case, blanks or a letter. Of each group the largest comes first."""
    alike: dict[str, list[str]] = {}
    for name in counts:
        alike.setdefault("".join(ch for ch in name.casefold() if ch.isalnum()) or name, []).append(name)
    groups = [sorted(names, key=lambda n: -counts[n]) for names in alike.values() if len(names) > 1]
    taken = {name for group in groups for name in group}
    whole = sum(counts.values())
    rare = [n for n in counts if counts[n] <= max(2, whole // 100) and n not in taken and len(n) >= 5]
    for name in rare[:SHOWN_CLASSES]:
        larger = [other for other in counts if counts[other] > 4 * counts[name]]
        groups += [[found, name] for found in difflib.get_close_matches(name, larger, 1, 0.85)]
    return groups


def _numbers(table: Table, columns: Columns, comma: bool = False) -> NDArray[np.float32]:
    values = _filled(table, columns)
    numbers = [_as_number(v, comma) for v in values]
    wrong = [f"{table.places[i]} ({values[i]!r})" for i, n in enumerate(numbers) if n is None]
    if wrong:
        raise DataError(
            f"{len(wrong)} values in column {columns.label!r} are no finite numbers, which regression needs:"
            f" {_some(wrong)}. Correct them, or use --task classification."
        )
    return np.asarray(numbers, dtype=np.float32)


def _regression(table: Table, columns: Columns) -> Task:
    comma = _has_decimal_commas(_filled(table, columns))
    numbers = _numbers(table, columns, comma)
    if np.all(numbers == numbers[0]):
        raise DataError(
            f"{table.source}: all {len(table)} numbers in column {columns.label!r} are {numbers[0]:g}: there is nothing"
            " to learn. Name another column with --label."
        )
    low, high = float(numbers.min()), float(numbers.max())
    center, scale = float(numbers.mean(dtype=np.float64)), float(numbers.std(dtype=np.float64))
    said = f"regression: numbers from {low:g} to {high:g}" + (", written with decimal commas" if comma else "")
    return Task(
        name="regression",
        written="decimal_comma" if comma else "",
        center=center,
        scale=scale,
        notes=(f"{said}; learnt with mean {center:g} and deviation {scale:g} taken out, answered in their own unit",),
    )


# --- tags -------------------------------------------------------------------------------------------------------------


def words_and_tags(table: Table, index: int, columns: Columns) -> tuple[list[str], list[str] | None]:
    """The words of one row and their tags (`None` where there is no column of tags, as in prediction).

    Lists, the JSON of lists, or text parted by blanks.

    Raises:
        DataError: not as many tags as words, or neither list nor text.
    """
    assert columns.tokens is not None
    place = table.places[index]
    words = _word_list(cell(table, index, columns.tokens), place, columns.tokens)
    if columns.tags is None:
        return words, None
    tags = _word_list(cell(table, index, columns.tags), place, columns.tags)
    if len(words) != len(tags):
        raise DataError(
            f"{place}: {len(words)} words in {columns.tokens!r} but {len(tags)} tags in {columns.tags!r}."
            " Give each word one tag."
        )
    return words, tags


def _word_list(value: Any, place: str, column: str) -> list[str]:
    if isinstance(value, str):
        if not value.lstrip().startswith("["):
            return value.split()
        found = _written_list(value)
        if found is None:
            return value.split()
        value = found
    if not isinstance(value, list | tuple):
        raise DataError(
            f"{place}: field {column!r} is {value!r}; it must be a list of words, or words parted by blanks."
        )
    return [label_name(v) for v in value]


def _token_classification(table: Table, columns: Columns) -> Task:
    names: set[str] = set()
    for i in range(len(table)):
        tags = words_and_tags(table, i, columns)[1]
        names.update(tags or ())
    labels = _sorted_names(names)
    if len(labels) < 2:
        what = f"all tags are {labels[0]!r}" if labels else "there are no tags"
        raise DataError(f"{table.source}: {what} in column {columns.tags!r}: there is nothing to learn. Check --tags.")
    spans = "O" in labels and all(n == "O" or n[:2] in ("B-", "I-") for n in labels)
    kind = "B-/I-/O tags, scored as spans" if spans else "tags, scored token by token"
    return Task(name="token_classification", labels=labels, spans=spans, notes=(f"{len(labels)} {kind}",))


# --- the test half ----------------------------------------------------------------------------------------------------


def _refuse_unknown(table: Table, names: Sequence[Sequence[str]], number: dict[str, int]) -> None:
    wrong = [f"{table.places[i]} ({n!r})" for i, row in enumerate(names) for n in row if n not in number]
    if wrong:
        raise DataError(
            f"{len(wrong)} labels are not among those of the training rows ({_some(list(number))}): {_some(wrong)}."
            " No model can learn them from these rows. Correct them, or move some of those rows to the training half."
        )


def _check_test(task: Task, test: Table, columns: Columns) -> None:
    missing = [c for c in columns.used().values() if c not in test.columns]
    if missing:
        raise DataError(
            f"{test.source}: no column {', '.join(map(repr, missing))}, which the training rows have. Its columns are"
            f" {', '.join(map(repr, test.columns))}. Both halves must name their columns alike."
        )
    if task.name == "token_classification":
        number = {name: i for i, name in enumerate(task.labels)}
        _refuse_unknown(test, [words_and_tags(test, i, columns)[1] or [] for i in range(len(test))], number)
    else:
        task.targets(test, columns)

"""What is learnt: which head the model gets, which labels there are, which score counts, how outputs are read."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from luthier.core import ConfigError, UnknownName, near
from luthier.data.columns import Columns
from luthier.data.label_cells import indicated, label_lists, label_names, numbers_of, of_task, refuse_unknown
from luthier.data.rows import Table
from luthier.runs.spec import GENERATED

__all__ = ["Task"]

AUTO_CLASSES = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "token_classification": "AutoModelForTokenClassification",
    "causal_lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "masked_lm": "AutoModelForMaskedLM",
    "span_corruption": "AutoModelForSeq2SeqLM",
    "preference": "AutoModelForCausalLM",
    "judged": "AutoModelForCausalLM",
    "prompts": "AutoModelForCausalLM",
    "reward": "AutoModelForSequenceClassification",
}
METRICS = {
    "classification": ("accuracy", "macro_f1", "mcc", "loss"),
    "multi_label": ("micro_f1", "macro_f1", "exact_match", "loss"),
    "regression": ("pearson", "spearman", "mse", "loss"),
    "token_classification": ("token_macro_f1", "token_accuracy", "loss"),
    "spans": ("span_f1", "token_accuracy", "loss"),
    "causal_lm": ("loss", "perplexity", "token_accuracy"),
    "seq2seq": ("loss", "perplexity", "token_accuracy"),
    "masked_lm": ("loss", "perplexity", "token_accuracy"),
    "span_corruption": ("loss", "perplexity", "token_accuracy"),
    "preference": ("pair_accuracy", "margin", "chosen_reward", "loss"),
    "judged": ("ranked", "reward_gap", "loss"),
    "reward": ("pair_accuracy", "margin", "loss"),
    "prompts": ("reward", "base_reward", "answer_tokens"),
}


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
    template: str = ""
    """of labels that are asked for by a gap in a text: the text around it; see `luthier.data.cloze`"""
    words: tuple[str, ...] = ()
    """the word of each label that fills the gap"""
    word_ids: tuple[int, ...] = ()
    gap: int = -1
    """the token that stands for the gap; -1 where it is the end of the text"""
    n_soft: int = 0
    """words of the template that are vectors of the method: number i has the id n_vocab + i"""
    filler: int = -1
    """the token that stands for each of them while a row is encoded"""
    asks: Literal["", "encoder", "decoder", "both"] = ""
    """what the model is that is asked so"""
    heads: tuple[tuple[int, ...], ...] = ()
    """of rows of several tasks with labels of their own: the numbers of each task's labels; see `with_heads`"""
    draws: int = 0
    """versions of each row, with other labelled rows shown beside it; 0 where the template shows none"""
    shown: tuple[tuple[str, ...], ...] = ()
    """the rows that may be shown: label and texts of each"""
    notes: tuple[str, ...] = ()
    """what was decided from the data, in sentences"""

    @property
    def auto_class(self) -> str:
        """The transformers class that loads a model with the right head."""
        if self.template:
            return AUTO_CLASSES[{"encoder": "masked_lm", "decoder": "causal_lm"}.get(self.asks, "seq2seq")]
        return AUTO_CLASSES[self.name]

    @property
    def of_words(self) -> bool:
        """Whether what is predicted are tokens of the model's vocabulary."""
        return self.name in ("causal_lm", "seq2seq", "masked_lm", "span_corruption")

    @property
    def weighs(self) -> bool:
        """Whether what is learnt is how good whole answers are: which of two is better, or what reward one gets."""
        return self.name in ("preference", "judged", "reward", "prompts")

    @property
    def of_turns(self) -> bool:
        """Whether rows are laid out by a chat template."""
        return self.name in ("causal_lm", "preference", "judged", "reward", "prompts")

    @property
    def writes(self) -> bool:
        """Whether what is learnt is to answer in text."""
        return self.name in ("causal_lm", "seq2seq", "preference", "judged", "prompts")

    @property
    def answers(self) -> bool:
        """Whether rows have one right answer in text."""
        return self.name in ("causal_lm", "seq2seq")

    @property
    def filled_in(self) -> bool:
        """Whether it predicts what was taken out of a text, so that it has no answer to a row."""
        return self.name in ("masked_lm", "span_corruption")

    @property
    def decodes(self) -> bool:
        """Whether an encoder-decoder writes the targets."""
        return self.name in ("seq2seq", "span_corruption")

    @property
    def n_outputs(self) -> int | None:
        """Numbers that the head puts out, for a row or a token; `None` where it is the vocabulary."""
        if self.template:
            return None
        return 1 if self.name in ("regression", "reward") else len(self.labels) or None

    @property
    def problem_type(self) -> str | None:
        """What transformers calls the kind of loss of a sequence classification head."""
        if self.template:
            return None
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
            ConfigError: it is of generated text, and rows have no one answer.
        """
        if name in self.metrics:
            return name
        if name in GENERATED and self.answers:
            return name
        if name in GENERATED and self.writes:
            raise ConfigError(
                f"eval.metric {name!r} compares what is written with one right answer, and rows of task {self.name} "
                f"have none. It can select by {', '.join(self.metrics)}."
            )
        known = [*self.metrics, *(GENERATED if self.answers else ())]
        raise UnknownName(f"task {self.name} has no score {name!r}.{near(name, known)} It has {', '.join(known)}.")

    def targets(self, table: Table, columns: Columns) -> NDArray[Any] | None:
        """One target for each row: class numbers (int64), 0 or 1 of each label (float32, (rows, labels)), or float32.

        `None` where targets are tokens or tags, which `encode` makes.

        Raises:
            DataError: a label that this task does not have, or no number where one is needed; names the rows.
        """
        if self.name == "regression":
            numbers = numbers_of(table, columns, self.written == "decimal_comma")
            return ((numbers - self.center) / self.scale).astype(np.float32)
        if self.name != "classification":
            return None
        number = {name: i for i, name in enumerate(self.labels)}
        if self.written == "indicators":
            names = indicated(table, columns, len(self.labels))
        elif self.multi_label:
            names = label_lists(table, columns)
        else:
            names = [[n] for n in label_names(table, columns)]
            if self.heads:
                names = [[of_task(row, columns, n)] for row, (n,) in zip(table.rows, names, strict=True)]
        refuse_unknown(table, names, number)
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

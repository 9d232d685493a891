"""What a run answers where it writes no text: labels, numbers, and tags of words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from luthier.data.batches import Batch, EvalBatches
from luthier.data.columns import Columns
from luthier.data.examples import IGNORED, Examples
from luthier.data.tag_tasks import words_and_tags
from luthier.data.tasks import Task
from luthier.surgery import Tuned
from luthier.training.evaluate import Evaluator
from luthier.training.objective import Objective, Result
from luthier.training.precision import Precision

__all__ = ["read_answers"]


def read_answers(
    examples: Examples, batches: EvalBatches, objective: Objective, columns: Columns, precision: Precision,
    device: torch.device, tunings: Sequence[str | None] | None,
) -> dict[int, dict[str, Any]]:  # fmt: skip
    """Row -> its answer, of those that could be encoded.

    Args:
        batches: of these examples.
        columns: of the rows that they were made of.
        tunings: for each row of the table the tuning that answers it; see `Tuned.rows`.
    """
    if len(examples) == 0:
        return {}
    tuned, task = objective.tuned, objective.task
    if tunings is not None:
        objective = _ByRow(tuned, task, [tunings[i] for i in examples.rows])
    out = Evaluator(tuned, objective, batches, precision, device).outputs()
    if task.name == "token_classification":
        return _tags(task, columns, examples, out["logits"])
    rows = examples.read_rows.tolist()
    if task.name == "reward":
        return {row: {"value": float(value)} for row, value in zip(rows, out["logits"][:, 0], strict=True)}
    decoded = task.decode(out["logits"])
    if task.name == "regression":
        return {row: {"value": value} for row, value in zip(rows, decoded, strict=True)}
    shares = task.probabilities(out["logits"])
    if task.heads:  # of the row's own task alone
        tasks = examples.facts["task"][examples.firsts].tolist()
        own = [task.heads[number] for number in tasks]
        return {
            row: {"label": label, "probabilities": {task.labels[i]: float(each[i]) for i in labels}}
            for row, label, each, labels in zip(rows, decoded, shares, own, strict=True)
        }
    return {
        row: {"label": label, "probabilities": {n: float(p) for n, p in zip(task.labels, each, strict=True)}}
        for row, label, each in zip(rows, decoded, shares, strict=True)
    }


def _tags(task: Task, columns: Columns, examples: Examples, logits: Sequence[Any]) -> dict[int, dict[str, Any]]:
    """One tag for each word of each row, in order; None for a word of which no token remains."""
    assert examples.words is not None
    inputs = columns.inputs()
    found: dict[int, dict[str, Any]] = {}
    for k, row in enumerate(examples.rows.tolist()):
        numbers = examples.words[examples.offsets[k] : examples.offsets[k + 1]]
        n_words = len(words_and_tags(examples.ledger.table, row, inputs)[0])
        answer = found.setdefault(row, {"tags": [None] * n_words, "sure": [None] * n_words})
        decoded = task.decode(np.asarray(logits[k]))
        sure = task.probabilities(np.asarray(logits[k])).max(-1, initial=0.0).tolist()
        for number, tag, share in zip(numbers[numbers != IGNORED].tolist(), decoded, sure, strict=True):
            answer["tags"][number], answer["sure"][number] = tag, share
    return found


class _ByRow(Objective):
    """The task's outputs, every row with the tuning that is named for it."""

    def __init__(self, tuned: Tuned, task: Task, names: Sequence[str | None]) -> None:
        super().__init__(tuned, task, full_logits=True)
        self.names = names

    def __call__(self, batch: Batch) -> Result:
        with self.tuned.rows([self.names[i] for i in batch.rows]):
            return super().__call__(batch)

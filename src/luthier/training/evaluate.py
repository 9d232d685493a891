"""Outputs for every row, in the data's order, and the scores of them. The one evaluator of the house."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core import ResourceError
from luthier.surgery import Tuned
from luthier.training import metrics
from luthier.training.batches import Batch, EvalBatches
from luthier.training.encode import IGNORED, Examples
from luthier.training.loop import out_of_memory
from luthier.training.objective import Objective
from luthier.training.precision import Precision
from luthier.training.tasks import Task

__all__ = ["Evaluator"]


class Evaluator:
    """Runs a tuned model over examples without training it.

    A batch that does not fit in memory is halved, and stays halved.
    """

    def __init__(
        self, tuned: Tuned, objective: Objective, batches: EvalBatches, precision: Precision, device: torch.device
    ) -> None:
        self.tuned, self.objective, self.batches = tuned, objective, batches
        self.precision, self.device = precision, device

    def outputs(self) -> dict[str, Any]:
        """Everything the scores need, in the order of the examples.

        Returns:
            loss: mean over targets; n_targets; and by task
            logits: (rows, outputs) for labels and measures, or a list of (targets, tags) for each row of tags;
            correct: tokens of a language model predicted right.
        """
        self.tuned.model.eval()
        losses, targets, correct = 0.0, 0, 0
        parts: list[tuple[NDArray[np.int64], list[Any]]] = []
        tokens = self.batches.tokens
        waiting = list(self.batches.pieces(tokens))
        with torch.inference_mode():
            while waiting:
                piece = waiting.pop(0)
                try:
                    batch = self.batches.collator(self.batches.examples, piece)
                    loss, right, rows = self._one(batch)
                except Exception as error:
                    if not out_of_memory(error):
                        raise
                    if len(piece) == 1:
                        raise ResourceError(
                            f"evaluation: one row of {batch.inputs['input_ids'].shape[1]} tokens alone does not fit "
                            "in memory. Lower max_length."
                        ) from error
                    half = len(piece) // 2
                    waiting[:0] = [piece[:half], piece[half:]]
                    continue
                losses += loss
                targets += batch.n_targets
                correct += right
                if rows is not None:
                    parts.append((piece, rows))
        result: dict[str, Any] = {"loss": losses / max(1, targets), "n_targets": targets, "correct": correct}
        if parts:
            order = np.argsort(np.concatenate([p for p, _ in parts]), kind="stable")
            values = [value for _, part in parts for value in part]
            ordered = [values[i] for i in order]
            result["logits"] = np.stack(ordered) if self.objective.task.name != "token_classification" else ordered
        return result

    def scores(self) -> dict[str, float]:
        """The task's scores, rounded by nobody, under their names."""
        out, task, examples = self.outputs(), self.objective.task, self.batches.examples
        found = {"loss": float(out["loss"]), "perplexity": metrics.perplexity(out["loss"])}
        if task.name in ("causal_lm", "seq2seq"):
            found["token_accuracy"] = out["correct"] / max(1, out["n_targets"])
        else:
            wanted = [n for n in task.metrics if metrics.METRICS[n].function is not None]
            if task.name == "token_classification":
                predictions = [task.decode(row) for row in out["logits"]]
                references = [[task.labels[t] for t in row] for row in _tags(examples)]
            else:
                predictions, references = task.decode(out["logits"]), _references(task, examples)
            found |= metrics.score(wanted, predictions, references)
        return {name: found[name] for name in task.metrics}

    def _one(self, batch: Batch) -> tuple[float, int, list[Any] | None]:
        batch = batch.to(self.device)
        with self.precision.autocast(self.device):
            result = self.objective(batch)
        task = self.objective.task
        loss = float(result.loss)
        if result.logits is None:
            return loss, 0, None
        logits = result.logits.float()
        if task.name in ("causal_lm", "seq2seq"):
            labels = result.labels
            if labels is None:
                return loss, 0, None
            best = logits.argmax(-1)
            if task.name == "causal_lm":
                best, labels = best[:, :-1], labels[:, 1:]
            return loss, int(((best == labels) & (labels != IGNORED)).sum()), None
        if task.name == "token_classification":
            labels = result.labels
            assert labels is not None
            return loss, 0, [row[mark != IGNORED].cpu().numpy() for row, mark in zip(logits, labels, strict=True)]
        return loss, 0, list(logits.cpu().numpy())


def _references(task: Task, examples: Examples) -> list[Any]:
    """What was wanted, in the words that `Task.decode` uses."""
    targets = examples.targets
    assert targets is not None
    if task.name == "regression":
        return [float(v) for v in targets.reshape(-1)]
    if task.multi_label:
        return [[task.labels[i] for i in np.flatnonzero(row > 0)] for row in targets]
    return [task.labels[int(t)] for t in targets]


def _tags(examples: Examples) -> list[list[int]]:
    assert examples.labels is not None
    rows = np.split(examples.labels, examples.offsets[1:-1])
    return [[int(t) for t in row if t != IGNORED] for row in rows]

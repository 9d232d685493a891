"""Outputs for every row, in the data's order, and the scores of them. The one evaluator of the house."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from luthier.core import ResourceError
from luthier.data.batches import Batch, EvalBatches, cut
from luthier.data.examples import IGNORED, Examples
from luthier.data.tasks import Task
from luthier.data.windows import mean_by_row
from luthier.surgery import Tuned, answered, answerers
from luthier.training import metrics
from luthier.training.objective import Objective, Result
from luthier.training.out_of_memory import is_out_of_memory, make_room
from luthier.training.precision import Precision

__all__ = ["Evaluator", "plain_scores", "references"]


class Evaluator:
    """Runs a tuned model over examples without training it.

    A batch that does not fit in memory is cut finer, and so are all that follow, in later evaluations too.

    Args:
        check: called between batches; what it raises ends the evaluation (a signal that asks for a stop).
        plainly: the model's own outputs, whatever a method would answer in place of them.

    Attributes:
        budget: padded tokens of a batch, at most.
        more: gives further scores of the same rows, such as those of written answers.
    """

    def __init__(
        self,
        tuned: Tuned,
        objective: Objective,
        batches: EvalBatches,
        precision: Precision,
        device: torch.device,
        check: Callable[[], None] = lambda: None,
        *,
        plainly: bool = False,
    ) -> None:
        self.tuned, self.objective, self.batches = tuned, objective, batches
        self.precision, self.device, self.check = precision, device, check
        self.budget = batches.tokens
        self.more: Callable[[], dict[str, float]] | None = None
        objective.examples = batches.examples
        self.plainly = plainly or not answerers(tuned)

    def try_longest(self) -> None:
        """Run the widest batch: memory runs out here, before step 1, or not at all.

        Raises:
            ResourceError: one row alone does not fit.
        """
        self.tuned.model.eval()
        pieces = self.batches.pieces(self.budget)[:1]
        with self._quiet():
            while pieces:
                pieces = self._finer(pieces[:1])[:1] if self._try(pieces[0]) is None else []

    def _quiet(self) -> AbstractContextManager[Any]:
        """Without gradients; a method that answers otherwise may take some inside."""
        return torch.inference_mode() if self.plainly else torch.no_grad()

    def outputs(self) -> dict[str, Any]:
        """Everything the scores need, in the order of the rows.

        Returns:
            loss: mean over targets; n_targets; and by task
            logits: (rows, outputs) for labels and measures, or a list of (targets, tags) for each row of tags;
            correct: tokens of a language model predicted right.

        Raises:
            ResourceError: one row alone does not fit in memory.
        """
        self.tuned.model.eval()
        losses, targets, correct = 0.0, 0, 0
        parts: list[tuple[NDArray[np.int64], list[Any]]] = []
        waiting = self.batches.pieces(self.budget)
        with self._quiet():
            while waiting:
                self.check()
                found = self._try(waiting[0])
                if found is None:
                    waiting = self._finer(waiting)
                    continue
                loss, n_targets, right, rows = found
                losses += loss
                targets += n_targets
                correct += right
                if rows is not None:
                    parts.append((waiting[0], rows))
                waiting = waiting[1:]
        result: dict[str, Any] = {"loss": losses / max(1, targets), "n_targets": targets, "correct": correct}
        if parts:
            order = np.argsort(np.concatenate([p for p, _ in parts]), kind="stable")
            values = [value for _, part in parts for value in part]
            ordered = [values[i] for i in order]
            result["logits"] = ordered
            if self.objective.task.name != "token_classification":
                result |= self._by_row(np.stack(ordered), result["loss"])
        return result

    def _by_row(self, logits: NDArray[Any], loss: float) -> dict[str, Any]:
        """Logits of rows, (rows, outputs), and the loss of these: of a row that was read in windows, their mean."""
        examples = self.batches.examples
        logits, n_examples = mean_by_row(logits, examples), len(logits)
        if len(logits) < n_examples and examples.targets is not None:
            targets = torch.from_numpy(examples.row_targets)
            loss = float(self.objective.loss(torch.from_numpy(logits), targets)) / len(logits)
        return {"logits": logits, "loss": loss}

    def _try(self, piece: NDArray[np.int64]) -> tuple[float, int, int, list[Any] | None] | None:
        """One batch's (loss, targets, right tokens, rows); None where memory ran out."""
        try:
            return self._one(self.batches.collator(self.batches.examples, piece))
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(piece) == 1:
                width = int(self.batches.examples.lengths[piece[0]])
                raise ResourceError(
                    f"evaluation: one row of {width} tokens alone does not fit in memory ({error}). Lower max_length, "
                    "or take a smaller model."
                ) from error
        make_room()
        return None

    def _finer(self, waiting: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
        """The same rows in batches half as wide as the first one, which did not fit."""
        lengths, rows = self.batches.examples.lengths, np.concatenate(waiting)
        self.budget = max(1, int(lengths[waiting[0]].max()) * (len(waiting[0]) // 2))
        most = min(self.batches.most, max(1, len(waiting[0]) // 2))
        return cut(rows, lengths, self.budget, most, self.batches.collator.pad_to)

    def scores(self) -> dict[str, float]:
        """The task's scores, rounded by nobody, under their names."""
        return self.scores_of(self.outputs())

    def scores_of(self, out: dict[str, Any]) -> dict[str, float]:
        """The task's scores of what `outputs` gave."""
        task, examples = self.objective.task, self.batches.examples
        found = {"loss": float(out["loss"]), "perplexity": metrics.perplexity(out["loss"])}
        if task.weighs:
            marks = examples.marks
            if task.name == "prompts":
                found |= metrics.of_rewards(out["logits"])
            elif marks is None or marks.shape[1] == 2:
                found |= metrics.of_pairs(out["logits"])
            else:
                found |= metrics.of_judged(out["logits"][:, 0], marks[:, 0] > 0)
        elif task.of_words:
            found["token_accuracy"] = out["correct"] / max(1, out["n_targets"])
        else:
            names = [n for n in task.metrics if metrics.METRICS[n].function is not None]
            if task.name == "token_classification":
                predictions = [task.decode(row) for row in out["logits"]]
                wanted = [[task.labels[t] for t in row] for row in _tags(examples)]
            else:
                predictions, wanted = task.decode(out["logits"]), references(task, examples)
            found |= metrics.score(names, predictions, wanted)
        scores = {name: found[name] for name in task.metrics}
        return scores if self.more is None else scores | self.more()

    def _answered(self, batch: Batch) -> Result:
        """What the method answers, scored."""
        found: Result = answered(self.tuned, lambda: self.objective(batch))
        if found.logits is None:
            return found
        return Result(self.objective.loss(found.logits, batch.labels), batch.n_targets, found.logits, batch.labels)

    def _one(self, batch: Batch) -> tuple[float, int, int, list[Any] | None]:
        batch, n = batch.to(self.device), batch.n_targets
        with self.precision.autocast(self.device):
            result = self.objective(batch) if self.plainly else self._answered(batch)
        task = self.objective.task
        loss = float(result.loss)
        if result.logits is None:
            return loss, n, result.correct or 0, None
        logits = result.logits.float()
        if task.of_words:
            labels = result.labels
            if labels is None:
                return loss, n, 0, None
            best = logits.argmax(-1)
            if task.name == "causal_lm":
                best, labels = best[:, :-1], labels[:, 1:]
            return loss, n, int(((best == labels) & (labels != IGNORED)).sum()), None
        if task.name == "token_classification":
            labels = result.labels
            assert labels is not None
            return loss, n, 0, [row[mark != IGNORED].cpu().numpy() for row, mark in zip(logits, labels, strict=True)]
        return loss, n, 0, list(logits.cpu().numpy())


def plain_scores(scores: dict[str, float], digits: int | None = None) -> dict[str, float | str]:
    """Scores for a JSON file, which has no word for what is not finite: a perplexity of "inf" is written as text."""
    return {
        name: (value if digits is None else round(value, digits)) if math.isfinite(value) else str(value)
        for name, value in scores.items()
    }


def references(task: Task, examples: Examples) -> list[Any]:
    """What was wanted, in the words that `Task.decode` uses."""
    targets = examples.row_targets
    if task.name == "regression":
        return [float(v) for v in task.in_unit(targets)]
    if task.multi_label:
        return [[task.labels[i] for i in np.flatnonzero(row > 0)] for row in targets]
    return [task.labels[int(t)] for t in targets]


def _tags(examples: Examples) -> list[list[int]]:
    assert examples.labels is not None
    rows = np.split(examples.labels, examples.offsets[1:-1])
    return [[int(t) for t in row if t != IGNORED] for row in rows]

"""One forward pass of one micro-batch, and its loss as a sum over targets.

The sum, not the mean: it is divided by the targets of the whole optimiser step, so neither accumulation nor the way a
step is cut into micro-batches changes the gradient.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier import kernels
from luthier.anatomy.word_logits import soft_capped, softcap_of
from luthier.data.batches import Batch, Batches
from luthier.data.examples import IGNORED, Examples
from luthier.data.tasks import Task
from luthier.surgery import Tuned
from luthier.training.answers import (
    Answer,
    Liked,
    Likely,
    Ranked,
    answer_log_chances,
    answers_elsewhere,
    positions_for_rows,
    standing_still,
)
from luthier.training.frozen_features import Features, features_of
from luthier.training.gap_words import GapWords
from luthier.training.output_matrix import trunk_states, why_all_logits, word_head_of

__all__ = ["Objective", "Result"]

_NEVER = -1e4  # a logit whose chance is 0 in every float, and that no half overflows by
_SCORED_ROWS = 512  # of logits at once: 100 MB in fp32 at a vocabulary of 50,000


@dataclass
class Result:
    """What one pass gives. `loss` is a sum over `n_targets`; `logits` is None where they were never all held.

    `correct` counts the targets that were the likeliest word, where that was asked for.
    """

    loss: Tensor
    n_targets: int
    logits: Tensor | None = None
    labels: Tensor | None = None
    correct: int | None = None


class Objective:
    """Computes the task's loss of a batch on a tuned model.

    Args:
        full_logits: hold all logits of a language model, because something looks at them.
        scoring: also count right guesses; no gradient then.
        judge: how answers are weighed, where that is learnt: a strategy of `luthier.training.preference`. Without one
            the better answers are learnt as text, or ranked by a head.
        tokenizer, columns: of the run, for a judge that reads texts.

    Attributes:
        reference: what the base holds of both answers of every example, (examples, 2), where that was kept.
        examples: those that are scored, where a reward reads the rows that they come from.
        room: tokens of a line that the model has positions for, where an answer is put to another prompt.
    """

    def __init__(
        self, tuned: Tuned, task: Task, *, full_logits: bool = False, scoring: bool = False, judge: Any = None,
        tokenizer: Any = None, columns: Any = None,
    ) -> None:  # fmt: skip
        self.tuned, self.task, self.scoring = tuned, task, scoring
        self.tokenizer, self.columns = tokenizer, columns
        self.examples: Examples | None = None
        self.judge = judge or {"judged": Liked, "reward": Ranked}.get(task.name, Likely)()
        self.reference: Tensor | None = None
        self.room = positions_for_rows(tuned) if getattr(self.judge, "elsewhere", False) else None
        self.why_all_logits = "something looks at them" if full_logits else ""
        if task.name in ("causal_lm", "preference", "judged", "prompts") and not full_logits:
            self.why_all_logits = why_all_logits(tuned)
        self.word_head: nn.Module | None = None
        if task.name == "masked_lm" and not full_logits:
            self.word_head, self.why_all_logits = word_head_of(tuned)
        self.chunked = (
            task.name in ("causal_lm", "preference", "judged", "prompts", "masked_lm") and not self.why_all_logits
        )
        self.labelled = task.name in ("classification", "regression") and not task.template
        self.gap = GapWords(tuned, task) if task.template else None
        self.first_token = tuned.fast.first_token() if self.labelled else None
        self.features: Features | None = None

    def keep_features(self, batches: Batches) -> Features | None:
        """From now on compute the frozen trunk once for each row of `batches`, where only the head trains.

        Every batch that comes must be of them. None, and nothing changes, where features may not be kept.
        """
        self.features = features_of(self.tuned, batches, self.cut) if self.labelled else None
        return self.features

    def __call__(self, batch: Batch) -> Result:
        """Run the model. Shapes of `logits`: (batch, classes), or (batch, tokens, classes) for tags and words.

        Of answers that are weighed they are their rewards: (pairs, 2), or (answers, 1).
        """
        if self.task.name == "prompts":
            rewards = self.judge.scored(self, batch)  # (prompts, 3)
            return Result(-rewards[:, 0].sum(), batch.n_targets, rewards)
        if self.task.weighs and batch.marks is not None:
            ways = {"preference": self._compared, "judged": self._judged, "reward": self._ranked}
            return ways[self.task.name](batch, batch.marks)
        if self.chunked and batch.labels is not None and kernels.fast():
            return self._chunked(batch)
        if self.features is not None and self.features.usable():
            logits = self._own_head(self.features.logits(batch), batch)
            return Result(self.loss(logits, batch.labels), batch.n_targets, logits, batch.labels)
        if self.gap is not None:
            logits = self.gap.logits(batch)
            return Result(self.loss(logits, batch.labels), batch.n_targets, logits, batch.labels)
        uncached = {"use_cache": False} if batch.packed else {}  # beside a cache transformers takes a line for one text
        with self.cut():
            out = self.tuned.model(**batch.inputs, **uncached)
        logits = self._own_head(out.logits if hasattr(out, "logits") else out[0], batch)
        return Result(self.loss(logits, batch.labels), batch.n_targets, logits, batch.labels)

    def _own_head(self, logits: Tensor, batch: Batch) -> Tensor:
        """Where tasks have labels of their own, those of other tasks than the row's are out of the question."""
        if not self.task.heads:
            return logits
        own = torch.zeros(len(self.task.heads), logits.shape[-1], dtype=torch.bool)
        for number, labels in enumerate(self.task.heads):
            own[number, list(labels)] = True
        tasks = batch.inputs["row_task"]
        return logits.masked_fill(~own.to(logits.device)[tasks], _NEVER)

    def cut(self) -> AbstractContextManager[None]:
        """Within, the last block is computed for what the head reads alone, where that is known.

        Around a backward pass too: under gradient checkpointing blocks are computed again there, as they were before.
        """
        return self.first_token.on() if self.first_token is not None and kernels.fast() else nullcontext()

    def loss(self, logits: Tensor, labels: Tensor | None) -> Tensor:
        """The summed loss, in fp32."""
        if labels is None:
            return logits.new_zeros((), dtype=torch.float32)
        values = logits.float()
        if self.task.name == "regression":
            return F.mse_loss(values.view(-1), labels.float().view(-1), reduction="sum")
        if self.task.multi_label:
            # The mean over labels, so that a row counts once however many labels there are.
            return F.binary_cross_entropy_with_logits(values, labels.float(), reduction="none").mean(-1).sum()
        if self.task.name == "causal_lm":
            values, labels = values[:, :-1], labels[:, 1:]
        return F.cross_entropy(
            values.reshape(-1, values.shape[-1]), labels.reshape(-1), ignore_index=IGNORED, reduction="sum"
        )

    def _chunked(self, batch: Batch) -> Result:
        """Hidden states to loss in chunks: only supervised tokens, never all logits."""
        model = self.tuned.model
        if self.word_head is not None:
            return self._masked(batch, self.word_head)
        hidden = trunk_states(self.tuned, batch.inputs)[:, :-1]
        assert batch.labels is not None
        labels = batch.labels[:, 1:]
        head: Any = model.get_output_embeddings()
        softcap = softcap_of(model)
        if self.scoring:
            return self._scored(hidden, labels, head, softcap, batch)
        # The function does by itself what autocast would: products in its type (the head may be an fp32 master), fp32
        # softmax.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            loss, _ = kernels.linear_cross_entropy(
                hidden.reshape(-1, hidden.shape[-1]), head.weight, head.bias, labels.reshape(-1), softcap=softcap,
                dtype=dtype,
            )  # fmt: skip
        return Result(loss, batch.n_targets, None, batch.labels)

    def _judged(self, batch: Batch, marks: Tensor) -> Result:
        """Answers by themselves; in training also those to other prompts of the step, where the judge asks."""
        base = self._base_sums(batch) if self.judge.reference else None
        elsewhere = None
        if self.judge.elsewhere and not self.scoring and len(batch.rows) > 1:
            others = answers_elsewhere(batch, self.room)
            with torch.no_grad(), standing_still(self.tuned.model):
                elsewhere = Answer(
                    *answer_log_chances(self.tuned, others, chunked=self.chunked), self._base_sums(others)
                )
        answer = Answer(*answer_log_chances(self.tuned, batch, chunked=self.chunked), base)
        losses = self.judge.losses(answer, marks[:, 0], elsewhere)
        return Result(losses.sum(), batch.n_targets, self.judge.reward(answer).detach()[:, None])

    def _ranked(self, batch: Batch, marks: Tensor) -> Result:
        """The rewards of both answers of each pair, by the head."""
        rewards = torch.stack(self.tuned.model(**batch.inputs).logits[:, 0].float().chunk(2), 1)
        return Result(self.judge.losses(rewards, marks).sum(), batch.n_targets, rewards)

    @torch.no_grad()
    def _base_sums(self, batch: Batch) -> Tensor:
        """The log-probability that the base gives each line's answer, its tuning asleep: (lines,)."""
        with standing_still(self.tuned.model), self.tuned.base_only():
            return answer_log_chances(self.tuned, batch, chunked=self.chunked)[0]

    def _compared(self, batch: Batch, marks: Tensor) -> Result:
        """Both answers of each pair, and what the judge makes of them."""
        base = self.base_chances(batch) if self.judge.reference else None  # first, while no graph is held
        sums, tokens = answer_log_chances(self.tuned, batch, chunked=self.chunked)
        chosen, rejected = (
            Answer(chance, n, None if base is None else base[:, side])
            for side, (chance, n) in enumerate(zip(sums.chunk(2), tokens.chunk(2), strict=True))
        )
        losses = self.judge.losses(chosen, rejected, marks)
        rewards = torch.stack([self.judge.reward(chosen), self.judge.reward(rejected)], 1).detach()
        return Result(losses.sum(), batch.n_targets, rewards)

    def base_chances(self, batch: Batch) -> Tensor:
        """The log-probabilities that the base gives both answers of each pair, its tuning asleep: (pairs, 2)."""
        if self.reference is not None:
            return self.reference[torch.from_numpy(batch.rows)].to(batch.inputs["input_ids"].device)
        return torch.stack(self._base_sums(batch).chunk(2), 1)

    def _masked(self, batch: Batch, word_head: nn.Module) -> Result:
        """The words that were taken out, one in seven, and no other: `logits` is (targets, words)."""
        assert batch.labels is not None
        told = batch.labels != IGNORED  # (rows, tokens)
        logits = word_head(trunk_states(self.tuned, batch.inputs)[told][None])[0]  # (1, targets, d) before the head
        return Result(self.loss(logits, batch.labels[told]), batch.n_targets, logits, batch.labels[told])

    def _scored(self, hidden: Tensor, labels: Tensor, head: nn.Linear, softcap: float | None, batch: Batch) -> Result:
        """Loss and right guesses of the supervised tokens, some rows of logits at a time."""
        told = labels != IGNORED
        rows, wanted = hidden[told], labels[told]
        loss, correct = 0.0, 0
        for start in range(0, len(rows), _SCORED_ROWS):
            logits = F.linear(rows[start : start + _SCORED_ROWS].to(head.weight.dtype), head.weight, head.bias).float()
            logits = soft_capped(logits, softcap)
            here = wanted[start : start + _SCORED_ROWS]
            loss += float(F.cross_entropy(logits, here, reduction="sum"))
            correct += int((logits.argmax(-1) == here).sum())
        return Result(torch.tensor(loss, dtype=torch.float64), batch.n_targets, None, batch.labels, correct)

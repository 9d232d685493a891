"""How activations grow with rows and tokens: real steps of luthier on cut copies of the model, counted as a run counts.

A copy has two or three of the layers, few words, and where the model is wide a share of its heads. What a forward pass
keeps grows with each of these along a line, and with the rows, so passes of two and four rows say what the whole model
keeps of many. Rows have the length that is asked about: attention is computed otherwise for short ones. And passes know
of how many rows and heads they are a share: beyond a size attention keeps no probabilities, so there is a line for few
rows and another for many.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from luthier import kernels
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tasks import Task
from luthier.forecast.work import Counting, Work
from luthier.runs.spec import OptimSpec
from luthier.surgery import Method, Tuned, attach
from luthier.surgery.checkpointing import checkpoints_itself
from luthier.training.memory_parts import Parts
from luthier.training.objective import Objective
from luthier.training.optimiser import Descent
from luthier.training.precision import Precision

__all__ = ["Growth", "Way", "batch_of", "growth", "text_of", "tuned_in"]

WORDS = 96
MOST_NUMBERS = 12_000_000  # of one layer; a wider one is cut to a share of its heads
ROWS = (2, 4)
STEPS = 1000  # of the run whose first step is made: what a method does in its first part is counted for all of it
NONE = Work()


@dataclass(frozen=True)
class Growth:
    """Bytes that a forward pass keeps of rows of `tokens` tokens: fixed + rows (row + logits).

    It holds for about as many rows as it was measured for: attention computes again what it would keep of fewer.

    Attributes:
        logits: of a row, what is as wide as the vocabulary.
        fixed_work, row_work: of a pass and its backward pass, likewise; products with the vocabulary are left out.
    """

    tokens: int
    fixed: float
    row: float
    logits: float
    fixed_work: Work = NONE
    row_work: Work = NONE

    def at(self, rows: int) -> int:
        """Bytes for so many rows."""
        return max(0, round(self.fixed + rows * (self.row + self.logits)))

    def part(self, other: Growth, share: float) -> Growth:
        """The line through this and `other`, `share` of the way on: 0 is this, 1 the other, 2 as far beyond."""
        mine, its = (self.fixed, self.row, self.logits), (other.fixed, other.row, other.logits)
        fixed, row, logits = (a + share * (b - a) for a, b in zip(mine, its, strict=True))
        return Growth(
            self.tokens, fixed, row, logits,
            self.fixed_work.part(other.fixed_work, share), self.row_work.part(other.row_work, share),
        )  # fmt: skip

    def wider(self, twice: Growth, step: float) -> Growth:
        """At the whole width, from a share `step` of it (this) and from twice the share: memory grows along a line."""
        return replace(
            self.part(twice, (1 - step) / step),
            fixed_work=self.fixed_work.widened(twice.fixed_work, step),
            row_work=self.row_work.widened(twice.row_work, step),
        )


@dataclass(frozen=True)
class Way:
    """How a run computes: fused functions, activations computed twice, the trunk's dropout on."""

    fast: bool = True
    checkpointing: bool = False
    dropout: bool = False


def growth(
    method: Method, config: Any, task: Task, make: Callable[[Any, torch.dtype], Any], tokens: int, *,
    rows: int, dtype: torch.dtype, precision: Precision, way: Way = Way(),
) -> Growth:  # fmt: skip
    """Measure how the activations of a method's step grow.

    Args:
        make: a model with the task's head from a configuration, its numbers of the given type.
        tokens: of each row.
        rows: of the pass that is asked about; measured are fewer.
        dtype: that the base is held in.

    Raises:
        Any error of a method that cannot be put on the smaller model.
    """
    words = text_of(config)
    layers = int(words.num_hidden_layers)

    def deep(share: float | None) -> Growth:
        low, high = min(layers, 2), min(layers, 3)
        of = (1.0 if share is None else share) / rows
        first = _passes(method, cut(config, low, share), task, make, dtype, precision, tokens, of, way)
        if low == high:
            return first
        second = _passes(method, cut(config, high, share), task, make, dtype, precision, tokens, of, way)
        return first.part(second, layers - low)

    step = _step(words)
    if step is None:
        found = deep(None)
    else:
        found = deep(step).wider(deep(2 * step), step)
    return replace(found, logits=found.logits * int(words.vocab_size))


def _step(config: Any) -> float | None:
    """The smallest share of the heads that leaves whole ones; None where the model is narrow enough as it is."""
    width = int(config.hidden_size)
    inner = int(getattr(config, "intermediate_size", None) or 4 * width)
    heads = int(config.num_attention_heads)
    least = heads // math.gcd(heads, int(getattr(config, "num_key_value_heads", None) or heads))
    if 4 * width**2 + 3 * width * inner <= MOST_NUMBERS or 2 * least >= heads:
        return None
    return least / heads


def cut(config: Any, layers: int, share: float | None) -> Any:
    """The configuration of a copy with so many layers, few words and a share of the heads."""
    whole = copy.deepcopy(config)
    made = text_of(whole)
    if made is not whole:
        _cut_beside(whole, made)
    made.num_hidden_layers = layers
    if getattr(made, "num_decoder_layers", None):
        made.num_decoder_layers = layers
    if getattr(made, "layer_types", None):
        made.layer_types = list(made.layer_types)[:layers]
    made.vocab_size = WORDS
    made.pad_token_id, made.bos_token_id, made.eos_token_id = 0, 1, 2
    if share is not None:
        for name in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            value = getattr(made, name, None)
            if value:
                setattr(made, name, max(1, round(value * share)))
    return whole


def text_of(config: Any) -> Any:
    """The part of a configuration that the words go through: of most models, all of it."""
    return config if hasattr(config, "num_hidden_layers") else config.get_text_config()


def _cut_beside(whole: Any, words: Any) -> None:
    """Towers that rows of words do not go through are made as small as they may be."""
    for name in getattr(whole, "sub_configs", ()):
        tower = getattr(whole, name, None)
        if tower is not None and tower is not words and getattr(tower, "num_hidden_layers", None):
            tower.num_hidden_layers = 1


def tuned_in(method: Method, model: Any, task: Task, way: Way) -> tuple[Tuned, Callable[[Batch], Any]]:
    """The method on a model as a run has it in its first step, and the loss of a micro-batch with all its passes."""
    tuned = attach(model, method, seed=0)
    several = [part for part in method.parts() if type(part).loss is not Method.loss]
    with kernels.plain(not way.fast):
        if way.fast:
            tuned.forward.route_attention()
            tuned.fast.accelerate(dropout=way.dropout)
        if way.checkpointing:
            tuned.forward.checkpoint_activations()
        model.train(way.dropout)
        model.luthier.train(True)
        for module in model.modules() if way.checkpointing else ():
            module.training = module.training or checkpoints_itself(module)
        for part in several:
            part.before_step(tuned, 1, STEPS)
        objective = Objective(tuned, task, full_logits=any(getattr(part, "needs_logits", False) for part in several))

    def loss(batch: Batch) -> Any:
        forward: Callable[[], Any] = partial(objective, batch)
        for part in several:
            forward = partial(part.loss, tuned, forward)
        found = forward()
        return found if isinstance(found, torch.Tensor) else found.loss

    return tuned, loss


def _passes(
    method: Method, config: Any, task: Task, make: Callable[[Any, torch.dtype], Any], dtype: torch.dtype,
    precision: Precision, tokens: int, of: float, way: Way,
) -> Growth:  # fmt: skip
    tuned, loss_of = tuned_in(method, make(config, dtype).eval(), task, way)
    optimiser = Descent(tuned.trained(), [], OptimSpec(name="sgd", lr=1.0), 1.0)
    found, work = [], []
    with kernels.plain(not way.fast):
        for rows in ROWS:
            parts, batch = Parts(tuned, optimiser, torch.device("cpu")), batch_of(rows, tokens, task, config)
            with Counting() as counted, kernels.share_of_a_pass(rows * of):
                with parts.watching(), precision.autocast(torch.device("cpu")):
                    loss = loss_of(batch)
                if loss.requires_grad:
                    torch.autograd.backward(loss)
            found.append(parts.counted())
            work.append(counted.work)
            optimiser.zero_grad()
    (few, many), words = found, int(text_of(config).vocab_size)
    row = (many["activations"] - few["activations"]) / (ROWS[1] - ROWS[0])
    row_work = (work[1] + work[0] * -1) * (1 / (ROWS[1] - ROWS[0]))
    return Growth(
        tokens, few["activations"] - ROWS[0] * row, row, many.get("logits", 0) / ROWS[1] / words,
        work[0] + row_work * -ROWS[0], row_work,
    )  # fmt: skip


def batch_of(rows: int, tokens: int, task: Task, config: Any, supervised: float = 1.0) -> Batch:
    """A batch of rows of one length; of tasks of words, so large a share of the tokens stands in the loss."""
    ids = torch.randint(3, WORDS, (rows, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    labels = ids.clone()
    if task.of_words and supervised < 1:
        labels[:, : tokens - max(1, round(supervised * tokens))] = IGNORED
    n_targets = int((labels != IGNORED).sum())
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = ids.clone()
    if task.name == "classification":
        labels = torch.zeros(rows, dtype=torch.int64)
        if task.multi_label:
            labels = torch.zeros(rows, len(task.labels))
    elif task.name == "regression":
        labels = torch.zeros(rows)
    elif task.name == "token_classification":
        labels = torch.zeros_like(ids)
    n_targets = n_targets if task.of_words else labels.numel()
    return Batch(inputs=inputs, labels=labels, rows=np.arange(rows), n_targets=n_targets, n_tokens=ids.numel())

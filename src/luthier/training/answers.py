"""Whole answers to a prompt: how likely the model holds them, and how two of them are compared.

log p(y | x) = Σ_t log p(y_t | x, y_<t)        over the tokens of the answer, with the token that ends it
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier import kernels
from luthier.anatomy.word_logits import softcap_of
from luthier.data.batches import Batch
from luthier.data.examples import IGNORED
from luthier.data.tokenizer import position_limit
from luthier.surgery import Tuned, reserved_positions
from luthier.training.output_matrix import trunk_states

__all__ = [
    "Answer",
    "Liked",
    "Likely",
    "Ranked",
    "answer_log_chances",
    "answers_elsewhere",
    "bradley_terry",
    "log_odds",
    "positions_for_rows",
    "standing_still",
    "token_log_chances",
]


@dataclass(frozen=True)
class Answer:
    """One answer of each pair. All are (pairs,), in fp32.

    Attributes:
        chance: its log-probability, a sum over its tokens.
        tokens: of the answer.
        base: its log-probability by the base, with the tuning asleep; None where nobody asked.
    """

    chance: Tensor
    tokens: Tensor
    base: Tensor | None = None

    @property
    def mean(self) -> Tensor:
        """Its log-probability for each token."""
        return self.chance / self.tokens

    @property
    def ratio(self) -> Tensor:
        """How much likelier the model holds it than its base does, as a logarithm."""
        assert self.base is not None, "a judge that asks the base says so: reference = True"
        return self.chance - self.base

    @property
    def mean_ratio(self) -> Tensor:
        """The same for each token."""
        return self.ratio / self.tokens


@dataclass(frozen=True)
class Likely:
    """No comparison: the better answer of each pair is learnt as text, each pair counting alike."""

    reference: bool = False

    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        return -chosen.mean

    def reward(self, answer: Answer) -> Tensor:
        return answer.mean


@dataclass(frozen=True)
class Liked:
    """No judgement: the answers that are liked are learnt as text, each counting alike."""

    reference: bool = False
    elsewhere: bool = False

    def losses(self, answer: Answer, liked: Tensor, elsewhere: Answer | None) -> Tensor:
        return -answer.mean * liked

    def reward(self, answer: Answer) -> Tensor:
        return answer.mean


@dataclass(frozen=True)
class Ranked:
    """Rewards whose differences say how likely each answer is to be found better."""

    def losses(self, rewards: Tensor, marks: Tensor) -> Tensor:
        return bradley_terry(rewards, marks[:, 0], marks[:, 1])


def bradley_terry(rewards: Tensor, share: Tensor, margin: Tensor) -> Tensor:
    """-[q log σ(Δ - m) + (1 - q) log σ(m - Δ)], Δ the difference of the rewards of each pair: (pairs,).

    Args:
        rewards: (pairs, 2).
        share: q, how many of the judges found the first better. margin: m, by how much.
    """
    apart = rewards[:, 0] - rewards[:, 1] - margin
    return -(share * F.logsigmoid(apart) + (1 - share) * F.logsigmoid(-apart))


def positions_for_rows(tuned: Tuned) -> int | None:
    """Tokens that the model has positions for, less those of the tuning's own; `None` where nothing limits them."""
    limit = position_limit(tuned.model.config)
    return None if limit is None else limit - reserved_positions(tuned.tuning().method, tuned.anatomy)


def answers_elsewhere(batch: Batch, room: int | None = None) -> Batch:
    """Each prompt of a batch with the answer of the line before, which is to another prompt.

    Args:
        room: tokens of a line, at most: an answer is cut where its new prompt leaves too few.
    """
    assert batch.labels is not None
    ids, labels = batch.inputs["input_ids"], batch.labels
    told = labels != IGNORED  # (lines, tokens)
    first = told.int().argmax(1).tolist()
    prompts = [ids[line, :n] for line, n in enumerate(first)]
    left = [None if room is None else room - n for n in first]
    replies = [ids[line - 1][told[line - 1]][:n] for line, n in enumerate(left)]
    width = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
    new_ids, mask = (ids.new_zeros(len(ids), width) for _ in range(2))
    new_labels = labels.new_full((len(ids), width), IGNORED)
    for line, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        n, end = len(prompt), len(prompt) + len(reply)
        new_ids[line, :end] = torch.cat([prompt, reply])
        new_labels[line, n:end] = reply
        mask[line, :end] = 1
    inputs = {**batch.inputs, "input_ids": new_ids, "attention_mask": mask}
    return replace(batch, inputs=inputs, labels=new_labels)


def answer_log_chances(tuned: Tuned, batch: Batch, *, chunked: bool) -> tuple[Tensor, Tensor]:
    """The log-probability of the labelled tokens of each line, and how many they are: (lines,) each.

    Args:
        chunked: from the states of the trunk, some logits at a time (`kernels.token_losses`).
    """
    chances, told = token_log_chances(tuned, batch, chunked=chunked)
    lines = told.nonzero()[:, 0]
    sums = torch.zeros(len(told), device=chances.device, dtype=chances.dtype).index_add(0, lines, chances)
    return sums, told.sum(1).to(sums.dtype)


def token_log_chances(tuned: Tuned, batch: Batch, *, chunked: bool, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The log-probability of each labelled token, (targets,), line after line; and where they are, (lines, tokens - 1).

    Args:
        chunked: from the states of the trunk, some logits at a time (`kernels.token_losses`).
        temperature: divides the logits.
    """
    assert batch.labels is not None
    labels = batch.labels[:, 1:]
    told = labels != IGNORED  # (lines, tokens - 1)
    wanted = labels[told]
    if chunked and kernels.fast() and (temperature == 1 or softcap_of(tuned.model) is None):
        model = tuned.model
        head: Any = model.get_output_embeddings()
        hidden, bias = trunk_states(tuned, batch.inputs)[:, :-1][told], head.bias  # (targets, d)
        if temperature != 1:  # of W h + b, wherever the product is made
            hidden, bias = hidden / temperature, None if bias is None else bias / temperature
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        with torch.autocast(device, enabled=False):
            losses = kernels.token_losses(hidden, head.weight, bias, wanted, softcap=softcap_of(model), dtype=dtype)
    else:
        logits = tuned.model(**batch.inputs).logits[:, :-1][told]
        losses = F.cross_entropy(logits.float() / temperature, wanted, reduction="none")
    return -losses, told


def log_odds(log_chance: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P, without 1 - P: finite where P rounds to 1, with a finite slope.

    >>> log_odds(torch.tensor([-0.6931472, -1e-12, 0.0])).round(decimals=2)  # of 1/2, and of what rounds to 1
    tensor([ 0.0000, 15.9400, 15.9400])
    """
    least = torch.finfo(log_chance.dtype).eps  # nearer to certainty there are no numbers
    x = log_chance.clamp(max=-least)
    rest = torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-x.exp()))
    return x - rest


@contextmanager
def standing_still(model: Any) -> Iterator[None]:
    """Within, the model is in evaluation mode: no dropout."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode

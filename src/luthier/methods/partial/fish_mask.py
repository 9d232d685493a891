"""FISH mask: before training, find the entries with the largest Fisher information; only those may move.

    F_i = (1 / N) sum_x (d log p(y_x | x) / d theta_i)^2      one row at a time, the observed labels
    M: the k entries with the largest F of the whole model, fixed before training

Nothing changes before the first step. The head always trains and counts in the budget.

Sung, Nair, Raffel 2021, "Training Neural Networks with Fixed Sparse Masks", arXiv:2111.09839, section 3. With
score=expected the square is averaged over the model's own classes, sum_y p(y | x), in place of the observed one. The
authors' code leaves the model in whatever mode it is in; here rows are scored in evaluation mode, without dropout.
With refresh_every the same rows are scored anew by the weights of that step, and the entries that are best then move
from there on. Those of earlier masks lie still and keep what they have learnt; all together are stored.

Count: floor(share * numbers below the head) - numbers of the head; with counts_head=false, without what is taken off.
    It is what moves at one time. With refresh_every what is stored grows with each new mask, at most by as many again;
    a plan counts the first alone.
Claims: near full fine-tuning at half a percent of the numbers, from a few hundred rows.
Cost: a pass forward and backward for each of `rows` rows before the first step, and at each new mask; else a step of
    full fine-tuning.
Use it when: a sparse difference is to be stored, and the mask should know the task.
Not when: memory is short: gradients and moments are those of the whole model.
Pitfalls: the square of a batch's gradient is not the mean of the rows' squares, and shrinks with the batch; words that
no row holds have a score of zero and tie; the best of each tensor are another mask. The optimiser's moments of an
entry go on where it comes back.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier import kernels
from luthier.anatomy import Anatomy
from luthier.core import ConfigError, at_least, between
from luthier.methods.parts.in_place import ScoredEntries
from luthier.methods.parts.masks import no_trace, top_k
from luthier.methods.parts.own_tensors import own_unfrozen
from luthier.methods.parts.update_masks import add_squares, kept, maskable, sizes_of
from luthier.surgery import METHODS, Batches, OneRow, TunedView, rows_of


@METHODS.register("fish_mask", family="partial", paper="arXiv:2111.09839")
@dataclass(frozen=True, kw_only=True)
class FishMask(ScoredEntries):
    """Settings of the FISH mask."""

    share: Annotated[float, "share of the model's numbers that may move, the head's among them", between(0, 1)] = 0.005
    rows: Annotated[int, "rows of the first epoch that are scored, at most", at_least(1)] = 1024
    score: Annotated[Literal["observed", "expected"], "whose labels: the rows', or all by the model's own odds"] = (
        "observed"
    )
    counts_head: Annotated[bool, "the head's numbers are taken off the budget"] = True
    refresh_every: Annotated[int, "steps until the mask is chosen anew; 0, never", at_least(0)] = 0

    default_lr: ClassVar[float] = 5e-3
    looks_again: ClassVar[str] = "refresh_every"
    tiny: ClassVar[Mapping[str, Any]] = {"share": 0.3}

    def tensors(self, anatomy: Anatomy) -> tuple[str, ...]:
        self.n_params(anatomy)  # refuses a share that keeps nothing, or all
        return maskable(anatomy, "all")

    def n_params(self, anatomy: Anatomy) -> int:
        sizes = sizes_of(anatomy, maskable(anatomy, "all"))
        head = sum(sizes_of(anatomy, anatomy.head_tensors)) if self.counts_head else 0
        left = kept(sizes, self.share, "model", self.name) - head
        if left <= 0:
            raise ConfigError(
                f"fish_mask.share: {self.share:g} of {sum(sizes)} numbers is less than the head's {head}, so nothing "
                f"else would move. Set it above {head / sum(sizes):.2g}, or counts_head=false."
            )
        return left

    def prepare(self, tuned: TunedView, batches: Batches) -> None:
        mine = own_unfrozen(self, tuned)
        rows = islice((row for look in batches for row in rows_of(look)), self.rows)
        with no_trace(tuned, training=False), kernels.plain(), _awake([u.parameter for u in mine]):
            scores = fisher([u.parameter for u in mine], rows, expected=self.score == "expected")
        for unfrozen, best in zip(mine, top_k(scores, self.n_params(tuned.anatomy)), strict=True):
            if self.refresh_every and unfrozen.mask is not None:
                unfrozen.mask, still = unfrozen.mask | best, unfrozen.mask & ~best
                unfrozen.let_lie(still)
            else:
                unfrozen.mask = best


@contextmanager
def _awake(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Within, all have gradients, also those that a strategy lets rest."""
    resting = [p for p in parameters if not p.requires_grad]
    try:
        for parameter in resting:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(False)


def fisher(parameters: list[torch.nn.Parameter], rows: Iterable[Any], *, expected: bool) -> list[Tensor]:
    """Mean over the rows of each squared gradient of log p.

    Raises:
        ConfigError: no row, no gradient, one that is not finite, or classes that cannot be told.
    """
    scores, seen = [torch.zeros_like(p, dtype=torch.float32) for p in parameters], 0
    for row in rows:
        seen += 1
        for weight, log_p in _chances(row(), expected):
            grads = torch.autograd.grad(log_p, parameters, allow_unused=True, retain_graph=expected)
            add_squares(scores, grads, weight)
    FishMask.check_scores(scores, seen)
    return [score.div_(seen) for score in scores]


def _chances(row: OneRow, expected: bool) -> list[tuple[float, Tensor]]:
    """Weights and log-chances whose squared gradients make up the row's information."""
    if not expected:
        return [(1.0, -row.loss)]
    if row.logits is None or row.logits.dim() != 2:
        raise ConfigError("fish_mask.score: expected averages over a row's classes; here a row has none. Use observed.")
    log_p = torch.log_softmax(row.logits[0].float(), dim=-1)
    return [(math.exp(float(one.detach())), one) for one in log_p]

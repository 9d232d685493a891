"""Beside few labelled rows, many others must be answered alike with and without some of their words.

    L = mean over labelled rows of [p(y) <= eta_t] CE + lambda mean over other rows of [max p > beta] KL(p_tau || p')

p: the model's chances for a row as it is, without dropout and without gradient; p_tau the same with logits over tau; p'
those for the row with dropout, and with a share `delete` of its embedded words put to zero. eta_t = a_t (1 - 1/C) + 1/C
for C labels holds rows that are known already back until late: a_t = t/T (linear), 1 - exp(-5 t/T) (log),
exp(5 (t/T - 1)) (exp), or 1 (none).

Each step has its usual labelled rows, and `ratio` times as many of the set `unlabelled`, drawn by seed and step. Both
means are over all rows of their kind, also those whose bracket is 0.

Paper: arXiv:1904.12848. lambda = 1, tau = .4, beta = .8 and some 7 rows to a labelled one are quoted for it, the 5 for
its code. It changes texts by translation there and back, or by words of small weight; here by words at random. Its code
divides by the labelled rows that count; here by all of them, so that a step may be cut.

Neutral: ratio = 0.
Cost: ratio times more rows in every step, and a forward pass more.
Claims: with some hundred labels near to what all labels reach.
Pitfalls: the file of the set has a column of labels like the run's; any label will do, none is read. Deleting words may
change what a short text says. Where nothing is surer than beta no other row counts: look at the logged share.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import above, at_least, between
from luthier.data.order import Order
from luthier.data.sets import Sets, others_beside, with_others
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy, fills
from luthier.training.told import told_of

RAMPS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: t,
    "log": lambda t: 1 - math.exp(-5 * t),
    "exp": lambda t: math.exp(5 * (t - 1)),
    "none": lambda t: 1.0,
}


@STRATEGIES.register("uda", family="mixture", paper="arXiv:1904.12848")
@dataclass(frozen=True, kw_only=True)
class UDA(Strategy):
    """Consistency on rows without labels."""

    neutral: ClassVar[dict[str, Any] | None] = {"ratio": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits", "embeddings")
    sets: ClassVar[tuple[str, ...]] = ("unlabelled",)
    extra_forwards: ClassVar[float] = 1.0
    tiny: ClassVar[dict[str, Any]] = {"ratio": 1.0, "sure": 0.0}

    ratio: Annotated[float, "rows without labels for each labelled one", at_least(0)] = 7.0
    weight: Annotated[float, "lambda, what they count", at_least(0)] = 1.0
    temperature: Annotated[float, "tau, below 1 for answers sharper than they are", above(0)] = 0.4
    sure: Annotated[float, "beta, how likely an answer must be to be learnt", between(0, 1)] = 0.8
    delete: Annotated[float, "share of words that are put to zero", between(0, 0.5)] = 0.1
    anneal: Annotated[Literal["none", "linear", "log", "exp"], "how known labelled rows come back"] = "none"

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh", "batches")):
            return f"{other.name} would read the labels of rows that have none. Use one of the two."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label or task.template:
            return "it compares answers of one label each, by a head. Leave it out."
        return None

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        return with_others(usual, sets.rows("unlabelled"), self.ratio, "uda")

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.ratio:
            return forward()
        sets, device = course.rows, piece.batch.inputs["input_ids"].device
        numbers = torch.from_numpy(sets.numbers(piece.batch.rows))
        other = (numbers == sets.names.index("unlabelled")).to(device)  # (rows,)
        with torch.no_grad(), course.still():
            clean = told_of(course.task, course.forward(piece.batch)).logits[other]
        keeps = self.kept_words(course, piece, other)
        with course.embedding(lambda e: e * keeps.to(e.dtype)):
            result = forward()
        told = told_of(course.task, result)
        n, most = piece.n_targets, len(sets.rows("unlabelled"))
        labelled = next((k for k in range(1, n) if k + others_beside(k, most, self.ratio) >= n), n)
        held = told.chances.detach() <= self.bound(course.step / max(1, course.total), told.logits.shape[-1])
        alike, sure = self.apart(clean, told.logits[other])
        course.note("sure", float(sure.float().mean()) if len(sure) else 0.0)
        result.loss = (told.losses * held)[~other].sum() * n / labelled
        result.loss = result.loss + self.weight * alike.sum() * n / max(1, n - labelled)
        return result

    def apart(self, clean: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        """What each row counts, (rows,), 0 where the answer is not sure; and whether it is. Logits: (rows, labels)."""
        sure = clean.softmax(-1).amax(-1) > self.sure
        wanted = (clean / self.temperature).softmax(-1)
        return F.kl_div(F.log_softmax(changed, -1), wanted, reduction="none").sum(-1) * sure, sure

    def bound(self, t: float, labels: int) -> float:
        """eta, the chance above which a labelled row is held back at this share of the run."""
        return RAMPS[self.anneal](t) * (1 - 1 / labels) + 1 / labels

    def kept_words(self, course: Course, piece: Piece, other: Tensor) -> Tensor:
        """0 for words that are put to zero, else 1: (rows, tokens, 1). The first token stays."""
        gone = course.draw(piece, 1) < 2 * self.delete - 1
        gone[:, 0] = False
        return 1.0 - (gone & other[:, None, None]).float()

"""Learn weak labels for a while, then learn from oneself: from sure answers of a copy that is renewed now and then.

    first    the task's loss on the rows' (weak) labels, for `init` of the steps
    then     mean over C of  w_i KL(y~_i || f_i) + mu_1 R + mu_2 KL(u || f_i)        no label is read any more

    y~_ij = (p_ij^2 / F_j) / sum_k (p_ik^2 / F_k)    F_j = sum_i p_ij       w_i = 1 - H(p_i) / log(labels)
    R = mean over pairs of C of  d^2 where y~ names one label, else max(0, gamma - d)^2       d = 1 - cos(v_i, v_j)

p are the copy's chances of a step's rows, f the model's, v the model's states of the rows, u the uniform ones, and C
the rows with w_i above `threshold`. The copy has no dropout and is renewed every `refresh` steps.

Paper: arXiv:2010.07835 (COSINE). The defaults are quoted for its code, where 150 steps come before 2500. There v is the
copy's, which teaches nothing, and H is divided by the log of the rows: here both are as in the paper.

Neutral: init = 1.
Cost: a forward pass more in each step after the first, and a copy of what trains.
Claims: from labels that rules gave, near to what true ones teach. Rows that no rule labels are not read here.
Pitfalls: where nothing is sure nothing is learnt: look at the logged share that is kept, and learn longer first, by
labels. What is sure and wrong stays so. Rows see one another, so a step is one micro-batch of 16 rows or more. Rows
whose labels are right lose by it: on 96 of trec6 (minilm-l6, LoRA, 120 steps, init = 0.5, one seed) it gives 0.613, the
plain run 0.793, and plain training of 60 steps 0.533. A step kept 0 to 25 % of its rows there, mostly 6 %: after 60
steps next to nothing is sure, and half of the steps were spent on that. With 600 rows, three in ten of them labelled
wrongly, 200 steps: 0.773 beside 0.830, and no row was kept: who learns noise is never as sure as `threshold` asks. With
0.2 three in four rows were kept, and it gave 0.740. What it claims was not seen here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import at_least, between
from luthier.data.tasks import Task
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy, fills
from luthier.training.told import told_of


@STRATEGIES.register("cosine_ws", family="loss", paper="arXiv:2010.07835")
@dataclass(frozen=True, kw_only=True)
class CosineWS(Strategy):
    """Contrastive self-training from weak labels."""

    neutral: ClassVar[dict[str, Any] | None] = {"init": 1.0}
    reads: ClassVar[tuple[str, ...]] = ("logits", "states")
    whole_step: ClassVar[bool] = True
    extra_forwards: ClassVar[float] = 1.0
    tiny: ClassVar[dict[str, Any]] = {"init": 0.3, "refresh": 2, "threshold": 0.0}

    init: Annotated[float, "share of the steps that learn the labels", between(0, 1)] = 0.06
    refresh: Annotated[int, "steps between two copies", at_least(1)] = 250
    threshold: Annotated[float, "xi, how sure an answer must be to be learnt; 0, not at all", between(0, 1)] = 0.6
    contrast: Annotated[float, "mu_1, what drawing states together and apart counts", at_least(0)] = 1.0
    unsure: Annotated[float, "mu_2, the price of being sure", at_least(0)] = 0.1
    margin: Annotated[float, "gamma, how far states of two labels must lie apart", between(0, 2)] = 1.0

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"what {other.name} trains does not move the trunk's states. Use a method inside the trunk."
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "batches")):
            return f"{other.name} would read labels after the first steps, when none is read. Use one of the two."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label or task.template:
            return "it learns the one label of each row, by a head. Leave it out."
        return None

    def start(self, course: Course) -> None:
        self._copy(course)

    def before_step(self, course: Course) -> None:
        since = course.step - 1 - self._first(course)
        if since >= 0 and since % self.refresh == 0:
            self._copy(course)

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if course.step <= self._first(course):
            return forward()
        # First, since a pass with other weights in place would spoil the graph of a pass before it.
        copies = {name: course.memory.tensors[name] for name in course.weights()}
        with torch.no_grad(), course.still(), course.holding(copies):
            p = told_of(course.task, course.forward(piece.batch)).logits.softmax(-1)  # (rows, labels)
        with course.states() as seen:
            result = forward()
        wanted, sure = self.soft(p)
        kept = sure > self.threshold
        course.note("kept", float(kept.float().mean()))
        each = self.learnt(
            wanted[kept], sure[kept], result.logits[kept].float(), seen.pooled(piece.batch)[kept].float()
        )
        result.loss = len(p) * each
        return result

    def soft(self, p: Tensor) -> tuple[Tensor, Tensor]:
        """Sharpened chances (rows, labels), and how sure each row is, from 0 to 1: (rows,)."""
        sharp = p.square() / p.sum(0)
        entropy = torch.special.entr(p).sum(-1)
        return sharp / sharp.sum(-1, keepdim=True), (1 - entropy / math.log(p.shape[-1])).clamp(0, 1)

    def learnt(self, wanted: Tensor, sure: Tensor, logits: Tensor, states: Tensor) -> Tensor:
        """The mean loss of the rows that are kept; nothing where none is."""
        n, log_f = len(wanted), F.log_softmax(logits, -1)
        from_copy = F.kl_div(log_f, wanted, reduction="none").sum(-1)  # (kept,)
        flat = -math.log(log_f.shape[-1]) - log_f.mean(-1)  # KL(u || f)
        loss = (sure * from_copy + self.unsure * flat).sum() / max(1, n)
        h = F.normalize(states, dim=-1)
        far = 1 - h @ h.T  # (kept, kept)
        label = wanted.argmax(-1)
        pairs = torch.where(label[:, None] == label[None], far.square(), (self.margin - far).clamp(min=0).square())
        return loss + self.contrast * pairs.triu(1).sum() / max(1, n * (n - 1) / 2)

    def _first(self, course: Course) -> int:
        return int(self.init * course.total)

    def _copy(self, course: Course) -> None:
        course.memory.tensors.update({name: p.detach().clone() for name, p in course.weights().items()})

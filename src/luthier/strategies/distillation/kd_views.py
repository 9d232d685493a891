"""Beside labelled rows, others are answered as a teacher does, twice, and a row's two states are nearest to each other.

    L = mean over labelled rows of CE + mean over other rows of [ KL(p_T || p') + KL(p_T || p'') ] / 2 + contrast C
    C = NT-Xent of z = P2 relu(P1 h):  mean over z of  -log exp(cos(z, z+) / tau) / sum_{z- != z} exp(cos(z, z-) / tau)

p_T is the teacher's distribution, asked once before step 1 and never made one answer; p' and p'' are the model's in two
passes with other dropout, h the states that the head reads, z+ the other pass of the same row. P1 and P2 train beside
and are dropped. Each step has its usual labelled rows, and `ratio` times as many of the set `unlabelled`.

Paper: arXiv:2010.07734 (STARTUP), whose two views are two crops of a picture; here they are two dropout masks, as in
arXiv:2104.08821. Equal weights, a temperature of 1 and a projection of 128 are quoted for its code.

Neutral: ratio = 0.
Cost: ratio times more rows in every step, and these a second time.
Claims: states that fit the other rows, however little the teacher's labels say of them.
Pitfalls: the file of the set has a column of labels like the run's; any will do, none is read. Rows see one another, so
a step is one micro-batch. Without dropout both views are one: trunk_dropout is on where nobody says otherwise.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError, above, at_least
from luthier.data.order import Order
from luthier.data.sets import Sets, with_others
from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy, fills
from luthier.training.told import told_of


@STRATEGIES.register("kd_views", family="distillation", paper="arXiv:2010.07734")
@dataclass(frozen=True, kw_only=True)
class KDViews(Strategy):
    """Soft labels of rows without any, and two views of each."""

    neutral: ClassVar[dict[str, Any] | None] = {"ratio": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits", "states")
    roles: ClassVar[tuple[str, ...]] = ("teacher",)
    sets: ClassVar[tuple[str, ...]] = ("unlabelled",)
    drops: ClassVar[bool] = True
    whole_step: ClassVar[bool] = True
    extra_passes: ClassVar[float] = 1.0

    teacher: Annotated[str, "the model that labels the other rows: a finished run on the same labels"] = ""
    ratio: Annotated[float, "rows without labels for each labelled one", at_least(0)] = 1.0
    contrast: Annotated[float, "what the two states of a row count", at_least(0)] = 1.0
    temperature: Annotated[float, "tau, below 1 for states that must be nearer", above(0)] = 1.0
    width: Annotated[int, "of the projection z", at_least(1)] = 128

    def check(self, spec: RunSpec) -> None:
        if not self.teacher:
            raise ConfigError("kd_views.teacher: no teacher is named. Give a finished run: --set teacher=runs/source.")

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"what {other.name} trains does not move the trunk's states. Use a method inside the trunk."
        if isinstance(other, Strategy) and any(fills(other, moment) for moment in ("loss", "weigh", "batches")):
            return f"{other.name} would read the labels of rows that have none. Use one of the two."
        return None

    def suits(self, task: Task) -> str | None:
        if task.name != "classification" or task.multi_label or task.template:
            return "it compares answers of one label each, by a head. Leave it out."
        return None

    def order(self, usual: Order, sets: Sets, spec: RunSpec) -> Order:
        return with_others(usual, sets.rows("unlabelled"), self.ratio, "kd_views")

    def numbers(self, course: Course) -> Mapping[str, Tensor]:
        if not (self.contrast and self.ratio):
            return {}
        d = int(course.tuned.anatomy.d)
        return {"first": torch.randn(d, d) / d**0.5, "second": torch.randn(self.width, d) / d**0.5}

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        sets, device = course.rows, piece.batch.inputs["input_ids"].device
        numbers = torch.from_numpy(sets.numbers(piece.batch.rows))
        other = (numbers == sets.names.index("unlabelled")).to(device)  # (rows,)
        if not self.ratio or not bool(other.any()):
            return forward()
        with course.states() as seen:
            result = forward()
            one = seen.pooled(piece.batch)[other].float()
            second = course.forward(piece.batch)  # the same rows with other dropout
            two = seen.pooled(piece.batch)[other].float()
        wanted = course.models["teacher"].logits(piece.batch).float()[other].softmax(-1)
        told = told_of(course.task, result)
        views = [told.logits[other], told_of(course.task, second).logits[other]]
        apart = sum(F.kl_div(F.log_softmax(v, -1), wanted, reduction="batchmean") for v in views) / 2
        course.note("apart", float(torch.as_tensor(apart).detach()))
        result.loss = len(numbers) * (told.losses[~other].mean() + apart)
        if self.contrast:
            first, last = course.numbers["first"], course.numbers["second"]
            z = [F.relu(h @ first.T) @ last.T for h in (one, two)]
            near = nt_xent(z[0], z[1], self.temperature)
            course.note("contrast", float(near.detach()))
            result.loss = result.loss + len(numbers) * self.contrast * near
        return result


def nt_xent(one: Tensor, two: Tensor, temperature: float) -> Tensor:
    """How hard it is to find a row's other view among all views, both (rows, width)."""
    z = F.normalize(torch.cat([one, two]), dim=-1)
    cosine = (z @ z.T / temperature).fill_diagonal_(float("-inf"))
    n = len(one)
    partner = torch.cat([torch.arange(n, 2 * n), torch.arange(n)]).to(z.device)
    return F.cross_entropy(cosine, partner)

"""The model's own recent past is its teacher: answers must stay near those of an average of earlier weights.

    L + lambda * mean_c (f(x; w) - f(x; w~))^2        summed over targets; no gradient through the teacher

    form = "mean"    w~ is the mean of the weights after the last k steps        (SDA; the start counts as one)
    form = "vote"    the teacher's answer is the mean of those of the last k weights      (SDV)
    form = "ema"     w~ <- d w~ + (1 - d) w,   d = min(decay, (1 + t) / (10 + t))

The teacher has no dropout. What is kept in the end is the model itself.

Paper: arXiv:2002.10345.

Neutral: weight = 0.
Cost: a forward pass more in each step (k in the form "vote"), and k copies of what trains (one in the form "ema").
Claims: better scores of BERT on classification and inference than plain fine-tuning. Our default k is a choice.
Pitfalls: early in a run the teacher knows as little as its pupil. A language model's loss is not chunked.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.core import at_least, between
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import told_of


@STRATEGIES.register("self_ensemble", family="stay_near", paper="arXiv:2002.10345")
@dataclass(frozen=True, kw_only=True)
class SelfEnsemble(Strategy):
    """Self-distillation from averages of the past."""

    neutral: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("logits", "states")
    extra_forwards: ClassVar[float] = 1.0

    form: Annotated[Literal["mean", "vote", "ema"], "what of the past teaches"] = "mean"
    k: Annotated[int, "how many steps back the past reaches; not of ema", at_least(1)] = 3
    weight: Annotated[float, "lambda, what the distance to the teacher counts", at_least(0)] = 1.0
    decay: Annotated[float, "share of the average that each step leaves, at most; of ema", between(0, 0.999999)] = 0.995

    def start(self, course: Course) -> None:
        self._keep(course, 0)

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        if not self.weight:
            return forward()
        # First, since a pass with other weights in place would spoil the graph of a pass before it.
        taught = self.teacher(course, piece)
        result = forward()
        logits = told_of(course.task, result).logits
        far = (logits - taught).square().mean(-1).sum()
        course.note("apart", float(far.detach()) / max(1, piece.n_targets))
        result.loss = result.loss + self.weight * far
        return result

    @torch.no_grad()
    def teacher(self, course: Course, piece: Piece) -> Tensor:
        """Its logits of the targets: (targets, classes)."""
        found = []
        for weights in self._teachers(course):
            with course.still(), course.holding(weights):
                found.append(told_of(course.task, course.forward(piece.batch)).logits)
        return torch.stack(found).mean(0)

    def after_step(self, course: Course) -> None:
        if self.form != "ema":
            self._keep(course, course.step % self.k)
            return
        share = min(self.decay, (1 + course.step) / (10 + course.step))
        for name, parameter in course.weights().items():
            course.memory.tensors[f"0 {name}"].lerp_(parameter.detach(), 1 - share)

    def _keep(self, course: Course, slot: int) -> None:
        course.memory.tensors.update({f"{slot} {n}": p.detach().clone() for n, p in course.weights().items()})

    def _teachers(self, course: Course) -> list[dict[str, Tensor]]:
        held = course.memory.tensors
        slots = sorted({int(name.split(" ", 1)[0]) for name in held})
        past = [{name: held[f"{slot} {name}"] for name in course.weights()} for slot in slots]
        if self.form == "vote":
            return past
        return [{name: torch.stack([one[name] for one in past]).mean(0) for name in course.weights()}]

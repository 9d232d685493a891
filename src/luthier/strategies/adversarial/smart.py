"""Answers must hardly change when the embedded text does, and hardly from one step to the next.

    L + lambda * l(f(E(x) + d), f(E(x))) + mu * l(f(x; w), f(x; w~))             summed over targets
    d: starts as N(0, sigma^2), climbs l(f(E(x) + d), sg f(E(x))) by `step` * slope / max|slope|
    w~ <- beta w~ + (1 - beta) w after each step

l is KL both ways, each with its second answer held fixed, or the squared difference of two numbers. The largest slope
is that of each row, so no number of d moves further than `step`.

Paper: arXiv:1911.03437. The authors' code takes the largest slope of each token, and divides the sum by it again, which
makes changes near 1; here the change is the step that is stated.

Neutral: smooth = 0, near = 0.
Cost: two forward and backward passes and one forward pass more in each step, and a copy of what trains.
Claims: better GLUE scores and robustness than plain fine-tuning.
Pitfalls: about three times as slow. Without gradients on the embedded text there is nothing to climb; such methods are
refused. With dropout on, two answers to the same text differ by themselves: its share is in both terms.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import at_least, between
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy
from luthier.training.told import log_chances, told_of


@STRATEGIES.register("smart", family="adversarial", paper="arXiv:1911.03437")
@dataclass(frozen=True, kw_only=True)
class SMART(Strategy):
    """Smoothness under small changes of the text, and steps that stay near."""

    neutral: ClassVar[dict[str, Any] | None] = {"smooth": 0.0, "near": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("embeddings", "logits")
    extra_passes: ClassVar[float] = 2.0
    extra_forwards: ClassVar[float] = 1.0

    smooth: Annotated[float, "lambda, what a changed answer to a changed text counts", at_least(0)] = 1.0
    near: Annotated[float, "mu, what the distance to the average of earlier weights counts", at_least(0)] = 1.0
    sigma: Annotated[float, "size of the first change", at_least(0)] = 1e-5
    step: Annotated[float, "how far each climb goes", at_least(0)] = 1e-3
    climbs: Annotated[int, "climbs in each step", at_least(1)] = 1
    beta: Annotated[float, "share of the average that each step leaves", between(0, 0.999999)] = 0.99

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"{other.name}'s loss has no gradient on the embedded text. Use a method inside the trunk."
        return None

    def start(self, course: Course) -> None:
        course.memory.tensors.update({name: p.detach().clone() for name, p in course.weights().items()})

    @torch.no_grad()
    def after_step(self, course: Course) -> None:
        for name, parameter in course.weights().items():
            course.memory.tensors[name].lerp_(parameter, 1 - self.beta)

    def loss(self, course: Course, piece: Piece, forward: Callable[[], Any]) -> Any:
        earlier = self._answer_of_average(course, piece) if self.near else None  # before any graph is there
        result = forward()
        clean = told_of(course.task, result).logits
        whole = result.loss
        if self.smooth:
            delta = self.climbed(course, piece, clean.detach())
            rough = self._distance(course, self._answer(course, piece, delta), clean)
            course.note("rough", float(rough.detach()) / max(1, piece.n_targets))
            whole = whole + self.smooth * rough
        if earlier is not None:
            whole = whole + self.near * self._distance(course, clean, earlier)
        result.loss = whole
        return result

    def climbed(self, course: Course, piece: Piece, clean: Tensor) -> Tensor:
        """The change of the embedded text: (rows, tokens, d), zero on padding."""
        width = course.tuned.anatomy.sites("embed", asked_by="smart")[0].d_out
        delta = course.draw(piece, width, "normal") * self.sigma
        for _ in range(self.climbs):
            delta.requires_grad_()
            far = self._distance(course, self._answer(course, piece, delta), clean)
            (slope,) = torch.autograd.grad(far, delta)
            largest = slope.abs().amax((1, 2), keepdim=True)  # (rows, 1, 1)
            mask = piece.batch.inputs["attention_mask"][..., None]
            delta = (delta.detach() + self.step * slope / largest.clamp(min=1e-30)) * mask
        return delta

    def _answer(self, course: Course, piece: Piece, delta: Tensor) -> Tensor:
        with course.embedding(lambda e: e + delta.to(e.dtype)):
            return told_of(course.task, course.forward(piece.batch)).logits

    @torch.no_grad()
    def _answer_of_average(self, course: Course, piece: Piece) -> Tensor:
        with course.still(), course.holding(course.memory.tensors):
            return told_of(course.task, course.forward(piece.batch)).logits

    def _distance(self, course: Course, one: Tensor, other: Tensor) -> Tensor:
        if course.task.name == "regression":
            return (one - other).square().sum()
        p, q = log_chances(course.task, one), log_chances(course.task, other)
        each = (p.exp() * (p - q.detach())).sum(-1) + (q.exp() * (q - p.detach())).sum(-1)
        return each.mean(-1).sum() if course.task.multi_label else each.sum()

"""Dropout whose off value is the weight at the start: each step trains with some numbers put back to where they were.

    u~ = (M u + (1 - M) w0 - p w0) / (1 - p)         M ~ Bernoulli(1 - p), for each number;   E[u~] = u
    grad_u = M / (1 - p) * grad_u~

Matrices that train are mixed; biases, norms and the new head are not: the head has no past. M is drawn anew for each
pass, of each micro-batch, and stays the same where activations are computed twice. With masks = "step" one M serves all
passes of a step, which then does not depend on how it is cut.

Paper: arXiv:1909.11299.

Neutral: p = 0.
Cost: a copy of what is mixed, and two copies of it for each micro-batch.
Claims: BERT-large fails less often on small GLUE tasks. It was tried with p from .7 to .9 there, in place of dropout:
add trunk_dropout = "off".
Pitfalls: on LoRA it is dropout of the numbers of A and B, since their start is the base model, and not of the weights
that they change. A high p needs a lower rate: gradients grow by 1 / (1 - p). As with dropout, a step that is cut
otherwise, for want of memory say, draws other masks: masks = "step" where that matters.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from luthier.core import between
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("mixout", family="stay_near", paper="arXiv:1909.11299")
@dataclass(frozen=True, kw_only=True)
class Mixout(Strategy):
    """Mix of a weight and its start."""

    neutral: ClassVar[dict[str, Any] | None] = {"p": 0.0}
    tiny: ClassVar[dict[str, Any]] = {"masks": "step"}  # the contract cuts steps in several ways

    p: Annotated[float, "share of numbers that are put back", between(0, 0.99)] = 0.7
    masks: Annotated[Literal["pass", "step"], "drawn for each pass, or once for a step"] = "pass"

    def start(self, course: Course) -> None:
        matrices = {n: p for n, p in course.weights(head=False).items() if p.dim() > 1}
        course.memory.tensors.update({n: p.detach().clone() for n, p in matrices.items()})

    def passes(self, course: Course, piece: Piece, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
        if not self.p:
            yield loss()
            return
        masks = {name: self._mask(course, name, piece.index) for name in course.memory.tensors}
        weights = course.weights()
        before = {name: weights[name].grad for name in masks}  # of micro-batches that came earlier
        for name in masks:
            weights[name].grad = None
        with course.holding(
            {name: self.mixed(weights[name], course.memory.tensors[name], m) for name, m in masks.items()}
        ):
            yield loss()
        for name, mask in masks.items():
            slope, earlier = weights[name].grad, before[name]
            if slope is None:
                weights[name].grad = earlier
            else:
                slope.mul_(mask / (1 - self.p))
                weights[name].grad = slope if earlier is None else slope + earlier

    @torch.no_grad()
    def mixed(self, weight: Tensor, start: Tensor, mask: Tensor) -> Tensor:
        """The weight with which a pass is made; written so that where nothing has moved, nothing moves."""
        return start + mask * (weight - start) / (1 - self.p)

    def _mask(self, course: Course, name: str, index: int) -> Tensor:
        """M of a weight in the micro-batch number `index`: 1 where its own number stays."""
        weight = course.weights()[name]
        # The first pass draws what a step of one pass draws under either setting.
        stream = ("mask", name, index) if index and self.masks == "pass" else ("mask", name)
        drawn = torch.rand(weight.shape, generator=course.generator(*stream))
        return (drawn >= self.p).to(weight)

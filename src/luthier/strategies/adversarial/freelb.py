"""Free large-batch adversarial training: gradients of k growing changes of the embedded text are kept together.

    delta_0 ~ U(-1, 1) * init_mag / sqrt(n d)            n tokens of the row, d its width; zero on padding
    for t = 1 .. k:   g += grad_theta L(E(x) + delta_{t-1}, y) / k
                      delta_t = project(delta_{t-1} + alpha * grad_delta / ||grad_delta||_F)

The projection is onto ||delta||_F <= epsilon, row by row; epsilon = 0 means none. delta_0 is projected too, which the
authors' code leaves out. Dropout is the same in all k passes. One update is made with the sum.

Paper: arXiv:1909.11764; the update is that of the authors' code for RoBERTa.

Neutral: k = 1, init_mag = 0.
Cost: k forward and backward passes of a step, and one tensor as large as the embedded text.
Claims: better accuracy than plain fine-tuning on GLUE. The defaults are those of the authors' code for MNLI.
Pitfalls: every step takes k times as long. Without gradients on the embedded text (a side network, features of a
frozen trunk) there is nothing to climb; such methods are refused.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from luthier.core import at_least
from luthier.surgery import Method
from luthier.training.course import Course, Piece
from luthier.training.strategy import STRATEGIES, Strategy


@STRATEGIES.register("freelb", family="adversarial", paper="arXiv:1909.11764")
@dataclass(frozen=True, kw_only=True)
class FreeLB(Strategy):
    """Adversarial changes of embeddings, with the gradients of all of them."""

    neutral: ClassVar[dict[str, Any] | None] = {"k": 1, "init_mag": 0.0}
    reads: ClassVar[tuple[str, ...]] = ("embeddings",)
    extra_passes: ClassVar[float] = 1.0

    k: Annotated[int, "changes of the text in each step, and so passes", at_least(1)] = 2
    alpha: Annotated[float, "how far each change climbs", at_least(0)] = 0.1
    init_mag: Annotated[float, "size of the first change", at_least(0)] = 0.2
    epsilon: Annotated[float, "largest norm of a row's change; 0, no limit", at_least(0)] = 0.2

    def conflicts(self, other: Strategy | Method) -> str | None:
        if isinstance(other, Method) and not other.through_trunk:
            return f"{other.name}'s loss has no gradient on the embedded text. Use a method inside the trunk."
        return None

    def passes(self, course: Course, piece: Piece, loss: Callable[[], Tensor]) -> Iterator[Tensor]:
        delta = self._first(course, piece)  # (rows, tokens, d)
        for t in range(self.k):
            delta = delta.detach().requires_grad_()
            with course.embedding(lambda e, delta=delta: e + delta.to(e.dtype)):  # type: ignore[misc]
                yield loss() / self.k
            if t + 1 < self.k:
                delta = self._climb(delta)

    def _first(self, course: Course, piece: Piece) -> Tensor:
        width = course.tuned.anatomy.sites("embed", asked_by="freelb")[0].d_out
        tokens = piece.batch.inputs["attention_mask"].sum(-1).clamp(min=1)  # (rows,)
        size = self.init_mag / (tokens * width).sqrt()
        return self._project(course.draw(piece, width) * size[:, None, None])

    def _climb(self, delta: Tensor) -> Tensor:
        assert delta.grad is not None, "conflicts() lets in only what has a gradient on the embedded text"
        slope = delta.grad
        norm = torch.linalg.vector_norm(slope, dim=(1, 2), keepdim=True)  # (rows, 1, 1)
        return self._project(delta.detach() + self.alpha * slope / norm.clamp(min=1e-12))

    def _project(self, delta: Tensor) -> Tensor:
        if not self.epsilon:
            return delta
        norm: Tensor = torch.linalg.vector_norm(delta, dim=(1, 2), keepdim=True)  # (rows, 1, 1)
        shrink: Tensor = (self.epsilon / norm.clamp(min=1e-12)).clamp(max=1.0)
        return delta * shrink

"""Losses of one half of the rows, and a search in which one half teaches the weights and the other what is searched.

Which half a row is in follows from its text, so it is the same in every epoch.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luthier.anatomy import Anatomy
from luthier.surgery import Attachment, TunedView

__all__ = ["Searched", "choice_gradient", "half_of", "numbers_below_head", "row_losses", "searched_loss"]


class Searched(Protocol):
    """What is searched: `alpha`, heard by a pass only where `lets_learn`; `halves`: those a step had rows of."""

    alpha: nn.Parameter
    lets_learn: bool
    halves: set[int]


def numbers_below_head(anatomy: Anatomy) -> int:
    """Numbers of the base, a new head left out."""
    return anatomy.n_params - sum(math.prod(anatomy.tensors[n]) for n in anatomy.head_tensors)


def half_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """0 or 1 for each row, by its tokens; padding changes nothing. (rows, T) -> (rows,)."""
    real = ids if mask is None or mask.shape != ids.shape else ids * (mask != 0)
    return (real.sum(-1) * 2_654_435_761 // 65_536) % 2  # mixed: sums of ids may all be odd


def row_losses(
    result: Any, ids: Tensor | None, mask: Tensor | None, half: int, anatomy: Anatomy, *, adds_up: bool
) -> tuple[Tensor, int]:
    """The loss of the rows of one half, and how many rows that stands for.

    It is as large as if all rows were like these. Where it `adds_up`, it is twice the sum instead: the same on average,
    and in micro-batches the same as in one batch, however these are cut.

    Where the rows' own losses do not add up to the task's, because it is no cross entropy of logits, the whole loss
    stands for both halves.
    """
    rows = _each(result, anatomy)
    if rows is None or ids is None or len(ids) != len(rows):
        return result.loss, int(getattr(result, "n_targets", 1))
    inside = half_of(ids, mask).to(rows.device) == half
    n = int(inside.sum())
    return (rows * inside).sum() * (2.0 if adds_up else len(rows) / max(1, n)), len(rows) if n else 0


def _each(result: Any, anatomy: Anatomy) -> Tensor | None:
    logits, labels = result.logits, result.labels
    if logits is None or labels is None or labels.is_floating_point():
        return None
    values = logits.float()
    for shift in (0, 1):
        if labels.dim() == 2 and values.dim() == 3:
            v, t = (values[:, :-1], labels[:, 1:]) if shift else (values, labels)
            if v.shape[:2] != t.shape:
                continue
            each = F.cross_entropy(v.transpose(1, 2), t, ignore_index=-100, reduction="none").sum(-1)
        elif labels.dim() == 1 and values.dim() == 2 and values.shape[1] > 1:
            each = F.cross_entropy(values, labels, ignore_index=-100, reduction="none")
        else:
            return None
        if torch.allclose(each.sum().detach(), result.loss.detach().float(), rtol=1e-2, atol=1e-3):
            return each
    return None


def searched_loss(
    gates: Searched,
    heard: Attachment,
    weights: Sequence[nn.Parameter],
    forward: Callable[[], Any],
    tuned: TunedView,
    second_order: bool,
    step: float,
) -> Any:
    """A result whose loss has the gradient of one half's loss for the weights, and of the other half's for α.

    To first order it adds up over the micro-batches of a step: see `row_losses`.
    """

    def of_half(half: int) -> tuple[Any, Tensor, int]:
        result = forward()
        ids, mask = heard.context.ids, heard.context.mask_for("")
        loss, n = row_losses(result, ids, mask, half, tuned.anatomy, adds_up=not second_order)
        gates.halves |= {half} if n else set()
        return result, loss, n

    # While a pass goes back its gates are as they were in it: its blocks may be computed anew for that.
    gates.lets_learn = False
    result, loss, n = of_half(0)  # for the weights alone
    through_step = second_order and n > 0
    grads = torch.autograd.grad(loss / n, weights, retain_graph=True, allow_unused=True) if through_step else ()
    gates.lets_learn = True
    if through_step:
        moved = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]
        with _Shifted(weights, moved, -step):
            towards, at_moved = _gradients(of_half(1), gates.alpha, weights)
        size = float(torch.sqrt(sum((g.square().sum() for g in at_moved), torch.zeros(()))))
        epsilon = 0.01 / max(size, 1e-12)
        with _Shifted(weights, at_moved, epsilon):
            above_, _ = _gradients(of_half(0), gates.alpha)
        with _Shifted(weights, at_moved, -epsilon):
            below, _ = _gradients(of_half(0), gates.alpha)
        towards = towards - step * (above_ - below) / (2 * epsilon)
    else:
        other = of_half(1)
        towards, n = _gradients(other, gates.alpha)[0], other[2]
    gates.lets_learn = False
    # A number that is zero and has the gradient of the other half.
    surrogate = (gates.alpha * towards).sum()
    result.loss = loss + (surrogate - surrogate.detach()) * max(1, n)
    return result


def choice_gradient(
    gates: Searched, heard: Attachment, forward: Callable[[], Any], tuned: TunedView, *, half: int
) -> Tensor:
    """The gradient by what is searched of one half's loss, summed over its rows, so that it adds up over a step."""
    gates.lets_learn = True
    result = forward()
    ids, mask = heard.context.ids, heard.context.mask_for("")
    loss, n = row_losses(result, ids, mask, half, tuned.anatomy, adds_up=True)
    return _gradients((result, loss, n), gates.alpha)[0] * max(1, n)


def _gradients(
    found: tuple[Any, Tensor, int], alpha: nn.Parameter, weights: Sequence[nn.Parameter] = ()
) -> tuple[Tensor, list[Tensor]]:
    _, loss, n = found
    if not n or not loss.requires_grad:
        return torch.zeros_like(alpha), [torch.zeros_like(p) for p in weights]
    one, *rest = torch.autograd.grad(loss / n, [alpha, *weights], allow_unused=True)
    filled = [torch.zeros_like(p) if g is None else g for p, g in zip(weights, rest, strict=True)]
    return (torch.zeros_like(alpha) if one is None else one), filled


class _Shifted:
    """Within, weights lie `size` times a direction away; their graphs do not hear of it."""

    def __init__(self, weights: Sequence[nn.Parameter], direction: Sequence[Tensor], size: float) -> None:
        self.weights, self.direction, self.size = weights, direction, size

    def __enter__(self) -> None:
        self.before = [p.data for p in self.weights]
        for p, d in zip(self.weights, self.direction, strict=True):
            p.data = p.data + self.size * d

    def __exit__(self, *_: object) -> None:
        for p, old in zip(self.weights, self.before, strict=True):
            p.data = old

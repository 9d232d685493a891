"""Losses of one half of the rows: which half a row is in follows from its text, so it is the same in every epoch."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.anatomy import Anatomy

__all__ = ["half_of", "numbers_below_head", "row_losses"]


def numbers_below_head(anatomy: Anatomy) -> int:
    """Numbers of the base, a new head left out."""
    return anatomy.n_params - sum(math.prod(anatomy.tensors[n]) for n in anatomy.head_tensors)


def half_of(ids: Tensor, mask: Tensor | None) -> Tensor:
    """0 or 1 for each row, by its tokens; padding changes nothing. (rows, T) -> (rows,)."""
    real = ids if mask is None or mask.shape != ids.shape else ids * (mask != 0)
    return (real.sum(-1) * 2_654_435_761 // 65_536) % 2  # mixed: sums of ids may all be odd


def row_losses(result: Any, ids: Tensor | None, mask: Tensor | None, half: int, anatomy: Anatomy) -> tuple[Tensor, int]:
    """The loss of the rows of one half, as large as if all rows were like these, and how many rows that stands for.

    Where the rows' own losses do not add up to the task's, because it is no cross entropy of logits, the whole loss
    stands for both halves.
    """
    rows = _each(result, anatomy)
    if rows is None or ids is None or len(ids) != len(rows):
        return result.loss, int(getattr(result, "n_targets", 1))
    inside = half_of(ids, mask).to(rows.device) == half
    n = int(inside.sum())
    return (rows * inside).sum() * (len(rows) / max(1, n)), len(rows) if n else 0


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

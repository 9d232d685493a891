"""Words of a template that are vectors of a tuning: their ids lie behind the vocabulary, so that they find themselves.

ids    101 2054 2003  V  103  V+1  102          V: rows of the word embedding; each {soft} of a template is one
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError
from luthier.surgery import Attachment, Base

__all__ = ["SoftWords", "soft_site", "words_site"]


def soft_site(anatomy: Anatomy, asked_by: str) -> Site:
    """The word embedding that reads the text: the encoder's, where there are two stacks."""
    sites = anatomy.sites("embed", asked_by=asked_by)
    return next((s for s in sites if s.stack == "encoder"), sites[0])


def words_site(anatomy: Anatomy, asked_by: str) -> Site:
    """The layer that scores the words of the vocabulary."""
    heads = [s for s in anatomy.all_sites if s.kind == "head" and s.d_out == anatomy.vocab_size]
    if not heads:
        raise AnatomyError(
            f"{asked_by}: this {anatomy.model_type} model has a head of labels and answers in no words. Ask for "
            "labels by a gap: --template '{text} It was {mask}.' --words 'label=word, ...'."
        )
    return heads[0]


class SoftWords(Attachment):
    """The vectors, at the word embedding. Every id from `first` on is one of them.

    Args:
        like: the id whose embedding they start as; None, small random ones.
    """

    kind = "sequential"

    def __init__(self, base: Base, length: int, first: int, like: int | None = None) -> None:
        super().__init__()
        self.first = first
        self.vectors = nn.Parameter(torch.randn(length, base.site.d_out) * 0.02)
        if like is not None and self.vectors.device.type != "meta":
            with torch.no_grad():  # through the layer, not from its table: some models scale what they look up
                looked_up: Tensor = base.module(torch.tensor([like], device=base.whole_weight().device))
                self.vectors.copy_(looked_up.float().expand(length, -1))

    def before(self, x: Any) -> Any:
        """x: (rows, T) ids; those behind the vocabulary look up another word, which `after` replaces."""
        return torch.where(x >= self.first, 0, x)

    def after(self, x: Any, y: Tensor) -> Tensor:
        """x: (rows, T) ids, as they came. y: (rows, T, d)."""
        chosen = self.vectors[(x - self.first).clamp(min=0, max=len(self.vectors) - 1)].to(y.dtype)  # (rows, T, d)
        return torch.where((x >= self.first)[..., None], chosen, y)

"""Tokens that are drawn: each row by a generator of its own, so that no neighbour changes what is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from luthier.core import ConfigError

__all__ = ["Drawn", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn, and by which names.

    Args:
        seeds: one for each row that is written; `luthier.core.key` makes one of words and numbers.
        temperature: divides the logits.
        top_p: the likeliest tokens that together have this chance are drawn from, and no other.
        top_k: so many of the likeliest tokens are drawn from; 0, all.

    Raises:
        ConfigError: a value that cannot work.
    """

    seeds: Sequence[int]
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ConfigError(f"temperature is {self.temperature:g}; it must be above 0. For the likeliest, draw none.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p:g}; it must be above 0 and at most 1, where nothing is left out.")
        if self.top_k < 0:
            raise ConfigError(f"top_k is {self.top_k}; it must be 0, where nothing is left out, or more.")

    def of(self, rows: Sequence[int]) -> Drawn:
        """What draws for these of the rows, in this order."""
        return Drawn([self.seeds[i] for i in rows], self.temperature, self.top_p, self.top_k)


class Drawn:
    """Makes of the likeliest token a drawn one: argmax of logits / T + Gumbel noise, which is a sample of softmax.

    Given to `generate` among its processors of logits, with do_sample=False.
    """

    def __init__(self, seeds: Sequence[int], temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> None:
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature, self._top_p, self._top_k = temperature, top_p, top_k

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (rows, vocabulary) whose largest is the token that is drawn."""
        even = torch.stack([torch.rand(scores.shape[-1], generator=draw) for draw in self._draws])
        noise = -(-even.clamp(1e-20, 1 - 1e-7).log()).log()
        return self._allowed(scores.float() / self._temperature) + noise.to(scores.device)

    def _allowed(self, scores: Tensor) -> Tensor:
        """Scores with what may not be drawn at minus infinity."""
        if 0 < self._top_k < scores.shape[-1]:
            least = scores.topk(self._top_k).values[:, -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self._top_p < 1:
            ordered, places = scores.sort(descending=True)
            chances = ordered.softmax(-1)
            over = chances.cumsum(-1) - chances >= self._top_p  # what stands before it is enough
            scores = scores.masked_fill(torch.zeros_like(over).scatter(-1, places, over), -torch.inf)
        return scores

"""One pair of frozen random matrices for all sites of a model."""

import math

import torch
from torch import Tensor, nn

__all__ = ["RandomPair"]


class RandomPair(nn.Module):
    """a: (halves rank, d_in) and b: (d_out, rank), drawn on the CPU as peft draws them: one number names one pair."""

    a: Tensor
    b: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, number: int, halves: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(number)
        for name, shape in (("a", (halves * rank, d_in)), ("b", (d_out, rank))):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
            value = torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=draw)
            self.register_buffer(name, value, persistent=False)

    def part(self, d_in: int, d_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B as a site of this shape has them: (halves rank, d_in) and (d_out, rank)."""
        return self.a[:, :d_in].to(dtype), self.b[:d_out].to(dtype)

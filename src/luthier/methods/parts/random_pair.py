"""One pair of frozen random matrices for all sites of a model."""

import math

import torch
from torch import Tensor, nn

from luthier.methods.parts.low_rank import Thin
from luthier.surgery import Base

__all__ = ["OfPair", "RandomPair"]


class RandomPair(nn.Module):
    """a: (halves rank, d_in) and b: (d_out, rank), drawn on the CPU as peft draws them: one number names one pair."""

    a: Tensor
    b: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, number: int, halves: int = 1) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(number)
        for name, shape in (("a", (halves * rank, d_in)), ("b", (d_out, rank))):
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(shape[1])
            # A device or type that is the default where this is called would draw other numbers.
            value = torch.empty(shape, device="cpu", dtype=torch.float32).uniform_(-bound, bound, generator=draw)
            self.register_buffer(name, value, persistent=False)

    def part(self, d_in: int, d_out: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B as a site of this shape has them: (halves rank, d_in) and (d_out, rank)."""
        return self.a[:, :d_in].to(dtype), self.b[:d_out].to(dtype)


class OfPair(Thin):
    """What stands at one site around the pair's matrices. v: (d_out,), at zero   d: (halves rank,), at `start`."""

    def __init__(self, pair: RandomPair, d_in: int, d_out: int, start: float, dropout: float) -> None:
        super().__init__(1.0, dropout)
        self.__dict__["pair"] = pair  # registered once, on the tuning
        self.d_in = d_in
        self.v = nn.Parameter(torch.zeros(d_out))
        self.d = nn.Parameter(torch.full((pair.a.shape[0],), start))

    def frozen(self) -> tuple[Tensor, Tensor]:
        """A and B as this site has them."""
        pair: RandomPair = self.__dict__["pair"]
        return pair.part(self.d_in, len(self.v), self.d.dtype)

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        # The fused product would want gradients as large as A and B; scaling what passes between them is less.
        return None

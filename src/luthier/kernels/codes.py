"""Weights as small codes: how a matrix (d_out, d_in) is written in few bits, and read again.

    nf4     blocks of 64 numbers, each c · NF4[code]; c in 8 bits about their mean, 256 at a time: 4.127 bits a weight
    int8    rows, each number c · code with c the row's largest over 127: 8 bits, and 32 a row
    int4    groups of 32 inputs, each number alpha · code + beta, code from 0 to 15: 5.5 bits a weight
    int2    the same with codes from 0 to 3: 3.5 bits

A part that is a number (absmax, alpha, beta) is never cast with the model: another type would be another weight.
`beta` is fp32 and may be moved: an update that is the same for all inputs of a group then merges without moving a code.

Dettmers et al. 2023 (QLoRA), arXiv:2305.14314, section 3, with its 16 levels. There the 8 bits of c follow a table of
uneven steps; here the steps are even. Xu et al. 2023 (QA-LoRA), arXiv:2309.14717, section 3.3, for the groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FORMATS", "GROUP", "Format", "Grouped", "Int8", "Nf4"]

GROUP = 32
"""Inputs of one group of `int4` and `int2`."""

_LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCK, _BLOCKS = 64, 256  # numbers of a block; blocks whose c share one constant


class Format(ABC):
    """One way to write a matrix."""

    @property
    @abstractmethod
    def name(self) -> str:
        """By which a run asks for it."""

    @abstractmethod
    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        """The parts that stand for a float weight (d_out, d_in)."""

    @abstractmethod
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """The weight (d_out, d_in) in fp32."""


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) below 2^bits, several to a byte, the first in the lowest bits."""
    each = 8 // bits
    rows = codes.view(-1, each)
    packed = torch.zeros(len(rows), dtype=torch.uint8, device=codes.device)
    for place in range(each):
        packed |= rows[:, place] << (bits * place)
    return packed


def _table(values: Tensor, bits: int) -> Tensor:
    """For each byte what its codes stand for: (256, 8 / bits)."""
    byte = torch.arange(256, device=values.device)
    return torch.stack([values[(byte >> (bits * place)) & (2**bits - 1)] for place in range(8 // bits)], 1)


def _look_up(packed: Tensor, table: Tensor) -> Tensor:
    """What bytes stand for, (bytes * codes in one,)."""
    if packed.is_meta:
        return table.new_empty(packed.numel() * table.shape[1])
    return table.index_select(0, packed.int()).flatten()


@dataclass(frozen=True)
class Nf4(Format):
    """4-bit NormalFloat with its block constants in 8 bits."""

    name = "nf4"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        flat = weight.detach().float().flatten()
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % _BLOCK)).view(-1, _BLOCK)
        absmax = blocks.abs().amax(1)
        levels = torch.tensor(_LEVELS, device=flat.device)
        unit = blocks / torch.where(absmax > 0, absmax, 1.0)[:, None]
        codes = torch.zeros(unit.shape, dtype=torch.uint8, device=unit.device)
        for middle in (levels[1:] + levels[:-1]) / 2:  # seven times as fast as bucketize
            codes += unit > middle
        mean = absmax.mean()
        off = torch.nn.functional.pad(absmax - mean, (0, -absmax.numel() % _BLOCKS)).view(-1, _BLOCKS)
        second = off.abs().amax(1)
        steps = off * (127 / torch.where(second > 0, second, 1.0))[:, None]
        eighths = steps.round().to(torch.int8).flatten()[: absmax.numel()].clone()
        return {"codes": _pack(codes.flatten(), 4), "absmax": eighths, "second": second, "mean": mean.reshape(1)}

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        eighths, second = parts["absmax"], parts["second"]
        table = _table(torch.tensor(_LEVELS, device=second.device), 4)
        # Of the last constant there may be fewer than 256 blocks.
        each = (second / 127).repeat_interleave(_BLOCKS)[: eighths.numel()]
        absmax = (eighths.float() * each + parts["mean"]).clamp_min_(0)
        values = _look_up(parts["codes"], table).view(-1, _BLOCK).mul_(absmax[:, None])
        # (blocks, 64) -> (numbers,) -> without the padding (d_out, d_in)
        return values.flatten()[: shape[0] * shape[1]].view(shape)


@dataclass(frozen=True)
class Int8(Format):
    """8-bit integers with one constant for each row."""

    name = "int8"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.detach().float()
        scale = wide.abs().amax(1) / 127
        return {"codes": (wide / torch.where(scale > 0, scale, 1.0)[:, None]).round().to(torch.int8), "scale": scale}

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        return parts["codes"].float().mul_(parts["scale"][:, None])


@dataclass(frozen=True)
class Grouped(Format):
    """`bits`-bit integers from 0, with a step alpha and an offset beta for each group of 32 inputs of a row.

    alpha is bf16 and codes are chosen for it as it is rounded; beta is fp32.
    """

    bits: int = 4

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def encode(self, weight: Tensor) -> dict[str, Tensor]:
        wide = weight.detach().float()
        d_out, d_in = wide.shape
        # A last group of fewer inputs is filled with copies of its last one, which change neither of its ends.
        filled = torch.cat([wide, wide[:, -1:].expand(d_out, -d_in % GROUP)], 1).view(d_out, -1, GROUP)
        low, high = filled.amin(2), filled.amax(2)
        alpha = ((high - low) / (2**self.bits - 1)).bfloat16()
        alpha = torch.where(alpha > 0, alpha, torch.ones_like(alpha))
        codes = ((filled - low[..., None]) / alpha.float()[..., None]).round().clamp_(0, 2**self.bits - 1)
        return {"codes": _pack(codes.to(torch.uint8).flatten(), self.bits), "alpha": alpha, "beta": low.contiguous()}

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        alpha, beta = parts["alpha"].float(), parts["beta"]
        table = _table(torch.arange(2**self.bits, device=beta.device, dtype=torch.float32), self.bits)
        codes = _look_up(parts["codes"], table).view(*beta.shape, GROUP)
        # (d_out, groups, 32) -> (d_out, groups * 32) -> without what filled the last group (d_out, d_in)
        return torch.addcmul(beta[..., None], codes, alpha[..., None]).flatten(1)[:, : shape[1]]


FORMATS: dict[str, Format] = {"nf4": Nf4(), "int8": Int8(), "int4": Grouped(4), "int2": Grouped(2)}
"""The formats by the names that a run gives them."""

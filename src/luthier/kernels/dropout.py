"""Counter-based dropout: the mask is a hash of (seed, element number), so it is replayed and never stored.

    y[i] = x[i] / (1 - p)  if u(seed, i) >= p  else  0

The framework's generator is serial on CPU and cannot be replayed. Here four 16-bit draws come out of each 64-bit
counter through three multiplications, in plain integer operations that every device vectorises; the draws are the same
bits on every device and for any number of threads. p is rounded to a multiple of 1/32768 and the scale is that of the
rounded p, so the expectation is exact.

Srivastava et al. 2014, "Dropout: A Simple Way to Prevent Neural Networks from Overfitting", section 10 (inverted form).
Counter-based draws: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3".
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from luthier.core import ConfigError
from luthier.core.fast_paths import fast

__all__ = ["dropout", "keep_mask"]

_LEVELS = 1 << 15
_STEP = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd: consecutive counters land far apart
_MIX_1 = 0xBF58476D1CE4E5B9  # the two multipliers of splitmix64
_MIX_2 = 0x94D049BB133111EB
_WORD = (1 << 64) - 1

# Counters per chunk: 64 Ki counters of 8 bytes and the temporary beside them are a 1 MiB second-level cache. Smaller
# chunks pay more for calls (benchmarks/kernels_dropout.py); the draws do not depend on this number.
_CHUNK = 1 << 16
_DRAWS = 4 * _CHUNK

_counters: dict[torch.device, Tensor] = {}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def _signed(number: int) -> int:
    number &= _WORD
    return number - (1 << 64) if number >> 63 else number


def _spread(seed: int) -> int:
    """splitmix64 of `seed`, so that neighbouring seeds name unrelated streams."""
    z = (seed + _STEP) & _WORD
    z = ((z ^ (z >> 30)) * _MIX_1) & _WORD
    z = ((z ^ (z >> 27)) * _MIX_2) & _WORD
    return z ^ (z >> 31)


def _counted(device: torch.device) -> Tensor:
    if device not in _counters:
        _counters[device] = torch.arange(_CHUNK, dtype=torch.int64, device=device) * _signed(_STEP)
    return _counters[device]


def _levels(p: float) -> int:
    if not 0.0 <= p < 1.0:
        raise ConfigError(f"dropout: p must be at least 0 and below 1, got {p!r}. Use p=0 for no dropout.")
    return min(round(p * _LEVELS), _LEVELS - 1)


def _draw(seed: int, first: int, count: int, level: int, z: Tensor, t: Tensor) -> Tensor:
    """Fill `z` with keep masks of `count` elements from counter `first` on: int16, all ones where kept."""
    n = (count + 3) // 4
    z, t = z[:n], t[:n]
    torch.add(_counted(z.device)[:n], _signed(_spread(seed) + first * _STEP), out=z)
    # The shifts are arithmetic, so each xor clears the top bit: x and ~x become one, of 2^64 states 2^63 stay, and the
    # last one clears a bit that is not drawn from. Adding instead of xor keeps all states and is useless: sums,
    # products and shifts are nearly linear together, and draws of neighbouring counters then correlate by up to 0.3.
    torch.bitwise_right_shift(z, 32, out=t)
    z.bitwise_xor_(t).mul_(_signed(_MIX_1))
    torch.bitwise_right_shift(z, 29, out=t)
    z.bitwise_xor_(t).mul_(_signed(_MIX_2))
    torch.bitwise_right_shift(z, 32, out=t)
    z.bitwise_xor_(t)
    draws = z.view(torch.int16)[:count]
    # 15 random bits minus the level; the sign, spread over all bits, is the mask of what is dropped.
    return draws.bitwise_and_(_LEVELS - 1).sub_(level).bitwise_right_shift_(15).bitwise_not_()


def keep_mask(shape: torch.Size | tuple[int, ...], p: float, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """The mask that `dropout` applies to a tensor of `shape`: bool, True where an element is kept.

    Raises:
        ConfigError: p lies outside [0, 1).
    """
    count = torch.Size(shape).numel()
    return (kept_bits(0, count, _levels(p), seed, torch.device(device)) != 0).view(shape)


def kept_bits(start: int, count: int, level: int, seed: int, device: torch.device) -> Tensor:
    """Masks of elements [start, start + count): int16, all ones where kept. For blocks of a larger tensor."""
    skipped = start % 4
    first = start // 4
    flat = torch.empty(count + skipped, dtype=torch.int16, device=device)
    z = torch.empty(min(_CHUNK, (len(flat) + 3) // 4), dtype=torch.int64, device=device)
    t = torch.empty_like(z)
    for begin in range(0, len(flat), _DRAWS):
        part = flat[begin : begin + _DRAWS]
        part.copy_(_draw(seed, first + begin // 4, len(part), level, z, t))
    return flat[skipped:]


def _apply(x: Tensor, level: int, seed: int) -> Tensor:
    integer = _INTEGER[x.element_size()]
    source = x.contiguous()
    out = torch.empty_like(source)
    flat_in, flat_out = source.view(-1), out.view(-1)
    bits_in, bits_out = flat_in.view(integer), flat_out.view(integer)
    scale = _LEVELS / (_LEVELS - level)
    z = torch.empty(min(_CHUNK, (x.numel() + 3) // 4), dtype=torch.int64, device=x.device)
    t = torch.empty_like(z)
    for start in range(0, x.numel(), _DRAWS):
        end = min(start + _DRAWS, x.numel())
        kept = _draw(seed, start // 4, end - start, level, z, t)
        # AND on the bits: a comparison and a multiplication by booleans cost five times as much on CPU.
        torch.bitwise_and(
            bits_in[start:end], kept if integer is torch.int16 else kept.to(integer), out=bits_out[start:end]
        )
        flat_out[start:end].mul_(scale)
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, level: int, seed: int) -> Tensor:
        ctx.level, ctx.seed = level, seed
        return _apply(x, level, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _apply(grad, ctx.level, ctx.seed), None, None


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """Drop each element of `x` with probability `p`; the same `seed` and shape always drop the same elements.

    Args:
        x: any shape, floating.
        seed: any integer; take it from `luthier.core.key(...)`. Nothing reads the ambient generator.

    Raises:
        ConfigError: p lies outside [0, 1).
    """
    level = _levels(p)
    if level == 0 or x.numel() == 0:
        return x
    if not fast():
        kept = keep_mask(x.shape, p, seed, x.device)
        return torch.where(kept, x, torch.zeros((), dtype=x.dtype, device=x.device)) * (_LEVELS / (_LEVELS - level))
    out: Tensor = _Dropout.apply(x, level, seed)  # type: ignore[no-untyped-call]
    return out

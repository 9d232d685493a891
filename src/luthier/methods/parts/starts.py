"""Where a low-rank update may start: parts of the frozen weight itself."""

from typing import Literal

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import ConfigError

__all__ = ["AT_ZERO", "Start", "check_start", "thin_start", "widest"]

Start = Literal["zero", "svd", "qr", "minor", "orthogonal", "mica", "eva", "corda", "lora_ga"]
AT_ZERO = ("zero", "orthogonal", "mica")
"""Starts at which B A is zero, so that nothing has to be kept of them."""

# From this width on the leading singular vectors are found by random projections: an exact SVD costs the cube of it.
_WIDE, _ROUNDS = 1024, 16


def check_start(rank: int, start: Start, site: Site, setting: str) -> None:
    """Refuse a rank that the weight does not have.

    Raises:
        ConfigError: with the largest that it may have.
    """
    if start == "orthogonal" and rank % 2:
        raise ConfigError(f"{setting}: start=orthogonal halves it, and {rank} is odd. Use {rank + 1}, or start=zero.")
    most = widest(start, site)
    if start not in ("zero", "orthogonal") and rank > most:
        raise ConfigError(
            f"{setting}: {rank} is above the {most} that the weight of {site.key} has, and start={start} takes its "
            f"parts from there. Set it to {most} or less, or use start=zero."
        )


def widest(start: Start, site: Site) -> int:
    """The largest rank that such a start can give; EVA's A is of what is read alone, LoRA-GA takes twice the rank."""
    most = min(site.d_in, site.d_out)
    return site.d_in if start == "eva" else most // 2 if start == "lora_ga" else most


def thin_start(weight: Tensor, rank: int, start: Start, scale: float) -> tuple[Tensor, Tensor]:
    """A: (rank, d_in) and B: (d_out, rank), with scale B A a part of the weight, (d_out, d_in).

    svd: what its largest singular values make. minor: what the smallest make. qr: the first columns of Q and rows of R,
    which is taken as it is, whatever the scale. mica: B is the smallest left singular vectors, A zero. orthogonal: A
    and B are drawn in two halves of the rank that have nothing in common, so B A is zero.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if weight.is_meta:
        return wide.new_empty(rank, wide.shape[1]), wide.new_empty(wide.shape[0], rank)
    if start == "orthogonal":
        turned, half = torch.linalg.qr(torch.randn(rank, rank)).Q, rank // 2
        a = torch.randn(wide.shape[1], half) @ turned[0::2] / 10
        b = torch.randn(half, wide.shape[0]).T @ turned[1::2] / 10
        return a.T.contiguous().to(wide), b.contiguous().to(wide)
    if start == "mica":
        u = torch.linalg.svd(wide, full_matrices=False).U
        return wide.new_zeros(rank, wide.shape[1]), u[:, u.shape[1] - rank :].contiguous()
    if start == "qr":
        q, r = torch.linalg.qr(wide)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if start == "svd" and min(wide.shape) >= _WIDE and 4 * rank < min(wide.shape):
        u, s, v = torch.svd_lowrank(wide, q=rank + 8, niter=_ROUNDS)
        vt = v.T
    else:
        u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    kept = slice(len(s) - rank, len(s)) if start == "minor" else slice(rank)
    root = (s[kept] / scale).sqrt()
    return (root[:, None] * vt[kept]).contiguous(), (u[:, kept] * root).contiguous()

"""Rotations: orthogonal matrices from numbers without a bound, block by block.

    R = (I - Q) (I + Q)^-1      Q = -Q^T      (Cayley)

R is orthogonal for every skew Q, and the identity at Q = 0. Inverses are exact here. A cut Neumann series is no
rotation, and peft's turns the other way round than its exact path does (tests/methods/test_orthogonal.py).

Qiu et al. 2023, arXiv:2306.07280, section 4.
"""

import torch
from torch import Tensor

__all__ = ["cayley", "cayley_series", "skew", "turn_blocks", "upper"]


def skew(numbers: Tensor, side: int) -> Tensor:
    """Skew matrices from what stands above their diagonals. (n, side (side - 1) / 2) -> (n, side, side)."""
    rows, columns = torch.triu_indices(side, side, 1, device=numbers.device)
    found = numbers.new_zeros(len(numbers), side, side)
    found[:, rows, columns] = numbers
    return found - found.transpose(1, 2)


def upper(matrices: Tensor) -> Tensor:
    """The inverse of `skew`. (n, side, side) -> (n, side (side - 1) / 2)."""
    rows, columns = torch.triu_indices(matrices.shape[1], matrices.shape[1], 1, device=matrices.device)
    return matrices[:, rows, columns]


def cayley(q: Tensor) -> Tensor:
    """(I - Q) (I + Q)^-1 for each of the skew matrices. (n, side, side) -> (n, side, side)."""
    one = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(q)
    found: Tensor = torch.linalg.solve(one + q, one - q, left=False)
    return found


def cayley_series(q: Tensor, terms: int) -> Tensor:
    """(I + Q) (I - Q)^-1 = I + 2 (Q + Q^2 + ...), cut as peft cuts it: `terms` in all, the last one once."""
    found = torch.eye(q.shape[1], dtype=q.dtype, device=q.device).expand_as(q).clone()
    power = q
    for i in range(1, terms):
        last = i == terms - 1 and terms > 2
        found = found + power * (1.0 if last else 2.0)
        power = power @ q
    return found


def turn_blocks(x: Tensor, r: Tensor) -> Tensor:
    """x times the block-diagonal matrix of the blocks r. x: (..., n side)   r: (n, side, side)."""
    blocks = x.reshape(-1, len(r), r.shape[1]).transpose(0, 1)  # (n, rows, side)
    return torch.bmm(blocks, r).transpose(0, 1).reshape(x.shape)

"""Kronecker products: a large matrix made of small ones, and what computes with it without forming it.

    (A (x) B) x = vec(A X B^T)      A: (a1, a2)    B: (b1, b2)    X: (a2, b2), x read row by row

    W = sum_k A_k (x) (s_k t_k)     A_k: (n, n)    s_k: (d_out / n, r)    t_k: (r, d_in / n)      (a PHM layer)

The second is thin: A_k (x) (s_k t_k) = (A_k (x) s_k) (I (x) t_k), of inner width n n r in all, and n r where A_k is of
rank one. So it goes where every low-rank product goes.

Edalati et al. 2022, arXiv:2212.10650, section 3. Karimi Mahabadi et al. 2021, arXiv:2106.04647, sections 3 and 4.
"""

import math

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import ConfigError
from luthier.surgery import Attachment

__all__ = ["KroneckerUpdate", "Rule", "check_divides", "kron_linear", "near_square", "phm_thin", "phm_weight"]


def near_square(n: int) -> tuple[int, int]:
    """The two factors of n that lie closest to each other, the smaller first.

    >>> near_square(768), near_square(11008)
    ((24, 32), (86, 128))
    """
    small = next(m for m in range(math.isqrt(n), 0, -1) if n % m == 0)
    return small, n // small


def check_divides(value: int, setting: str, site: Site, *sides: str) -> None:
    """Refuse a number that does not divide the widths of a place.

    Args:
        setting: how the user calls it, such as "lokr.factor".
        sides: of the weight: "d_in", "d_out".

    Raises:
        ConfigError: with the numbers near it that do.
    """
    widths = [getattr(site, side) for side in sides]
    if all(width % value == 0 for width in widths):
        return
    common = math.gcd(*widths)
    fits = [m for m in range(1, common + 1) if common % m == 0]
    near = sorted(sorted(fits, key=lambda m: abs(m - value))[:4])
    raise ConfigError(
        f"{setting}: {value} does not divide the {' and '.join(map(str, widths))} of {site.key} "
        f"({' and '.join(sides)}). Near it, {', '.join(map(str, near))} do."
    )


def kron_linear(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(A (x) B) x for every row of x, by two small products. x: (..., a2 b2) -> (..., a1 b1)."""
    (a1, a2), (b1, b2) = a.shape, b.shape
    grid = x.reshape(-1, a2, b2)
    # Products of two matrices only: how torch multiplies a matrix and a stack, and so the last bit, depends on whether
    # a gradient is wanted. Whichever order multiplies less: they differ where one factor narrows and the other widens.
    if a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1):
        out = _along_rows(_along_columns(grid, b), a)
    else:
        out = _along_columns(_along_rows(grid, a), b)
    return out.reshape(*x.shape[:-1], a1 * b1)


def _along_columns(grid: Tensor, b: Tensor) -> Tensor:
    """(n, a, b2) -> (n, a, b1)."""
    return (grid.reshape(-1, grid.shape[2]) @ b.T).view(*grid.shape[:2], len(b))


def _along_rows(grid: Tensor, a: Tensor) -> Tensor:
    """(n, a2, b) -> (n, a1, b)."""
    turned = grid.transpose(1, 2)  # (n, b, a2)
    return _along_columns(turned, a).transpose(1, 2)


class KroneckerUpdate(Attachment):
    """Adds `scale * (A (x) B) x` to the output; `factors()` says what A and B are."""

    kind = "delta"

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def factors(self) -> tuple[Tensor, Tensor]:
        """A: (a1, a2) and B: (b1, b2), with a1 b1 = d_out and a2 b2 = d_in."""
        raise NotImplementedError

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return y + kron_linear(x, *self.factors()) * self.scale

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + torch.kron(*(f.contiguous() for f in self.factors())) * self.scale, bias


class Rule(nn.Module):
    """The n matrices A_k that all places share, whole or each as a column times a row; drawn with the size 1/sqrt(n),
    so that the sum over k does not grow with n. Registered once, on the tuning.
    """

    def __init__(self, n: int, *, rank_one: bool = False) -> None:
        super().__init__()
        size = 1 / math.sqrt(n)
        if rank_one:
            self.u = nn.Parameter(torch.randn(n, n) * math.sqrt(size))  # (which, rows)
            self.v = nn.Parameter(torch.randn(n, n) * math.sqrt(size))  # (which, columns)
        else:
            self.a = nn.Parameter(torch.randn(n, n, n) * size)  # (which, rows, columns)

    @property
    def rank_one(self) -> bool:
        """Whether each A_k is a column times a row."""
        return not hasattr(self, "a")

    def whole(self) -> Tensor:
        """The A_k, (n, n, n)."""
        return self.u[:, :, None] * self.v[:, None, :] if self.rank_one else self.a


def phm_weight(rule: Rule, s: Tensor, t: Tensor) -> Tensor:
    """sum_k A_k (x) (s_k t_k), (d_out, d_in). s: (n, d_out / n, r)   t: (n, r, d_in / n)."""
    n, o, i = len(s), s.shape[1], t.shape[2]
    return torch.einsum("kpq,kor,kri->poqi", rule.whole(), s, t).reshape(n * o, n * i)


def phm_thin(rule: Rule, s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same as a thin product: A: (inner, d_in) and B: (d_out, inner), inner being n n r, or n r at rank one."""
    n, o, r, i = len(s), s.shape[1], s.shape[2], t.shape[2]
    if rule.rank_one:
        b = torch.einsum("kp,kor->pokr", rule.u, s).reshape(n * o, n * r)
        return torch.einsum("kq,kri->krqi", rule.v, t).reshape(n * r, n * i), b
    one = torch.eye(n, dtype=t.dtype, device=t.device)
    b = torch.einsum("kpq,kor->pokqr", rule.whole(), s).reshape(n * o, n * n * r)
    return torch.einsum("qj,kri->kqrji", one, t).reshape(n * n * r, n * i), b

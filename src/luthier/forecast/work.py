"""The work of a pass, counted while it is made: operations of products, bytes moved, calls of the library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Counting", "Work"]

_LINEAR = ("mkldnn::_linear_pointwise", "aten::mkldnn_linear", "aten::linear")
_ATTENTION = "aten::_scaled_dot_product"
_ATTENTION_PRODUCTS = {False: 2, True: 5}  # of queries, keys and values; five of them on the way back


@dataclass(frozen=True)
class Work:
    """Operations of matrix products (a multiplication and an addition are two), bytes read and written, calls."""

    products: float = 0.0
    moved: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.moved + other.moved, self.calls + other.calls)

    def __mul__(self, times: float) -> Work:
        return Work(self.products * times, self.moved * times, self.calls * times)

    def part(self, other: Work, share: float) -> Work:
        """`share` of the way from this to `other`, and never below nothing."""
        found = self + (other + self * -1) * share
        return Work(max(0.0, found.products), max(0.0, found.moved), max(0.0, found.calls))

    def widened(self, twice: Work, step: float) -> Work:
        """The work of a whole width, from that of a share `step` of it (this) and of twice the share.

        Work grows with the width b s + c s^2: maps on either side of a token's vector, and what is made of each number
        of it. Two points say b and c. Calls do not grow.
        """

        def whole(once: float, double: float) -> float:
            square = max(0.0, (double - 2 * once) / 2)
            return max(0.0, (once - square) / step + square / step**2)

        return Work(whole(self.products, twice.products), whole(self.moved, twice.moved), twice.calls)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts everything that is called inside, backward passes too.

    >>> import torch
    >>> with Counting() as counted:
    ...     _ = torch.ones(2, 3) @ torch.ones(3, 4)
    >>> counted.work.products, counted.work.calls
    (48.0, 3.0)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = list(_tensors((*args, *(kwargs or {}).values()))), list(_tensors((out,)))
        if not func._schema.is_mutable and _only_views(given, made):
            return out
        moved = sum(t.numel() * t.element_size() for t in {id(t): t for t in (*given, *made)}.values())
        self.work += Work(_products(func.name(), given, made), moved, 1.0)
        return out


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _only_views(given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether a call has moved nothing: what came out looks at memory that was there."""
    try:
        there = {t.untyped_storage().data_ptr() for t in given}
        return bool(made and given) and all(t.untyped_storage().data_ptr() in there for t in made)
    except (NotImplementedError, RuntimeError):  # opaque layouts have no storage to look at
        return False


def _products(name: str, given: list[Tensor], made: list[Tensor]) -> float:
    """Operations of a call; 0 where it is no product."""
    base = name.partition(".")[0]
    if base in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::addmm_", "aten::baddbmm_"):
        left, out = given[-2], made[0]
        return 2.0 * out.numel() * left.shape[-1]
    if base in _LINEAR:
        return 2.0 * made[0].numel() * given[0].shape[-1]
    if base.startswith(_ATTENTION):
        back = base.endswith("backward")
        query, key = given[1 if back else 0], given[2 if back else 1]
        return 2.0 * _ATTENTION_PRODUCTS[back] * query.numel() * key.shape[-2]
    return 0.0

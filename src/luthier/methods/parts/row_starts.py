"""Where a low-rank update may start once rows have been seen: what layers read, or the gradient of their weight."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from luthier import kernels
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import MovedUpdate
from luthier.methods.parts.masks import no_trace
from luthier.methods.parts.posterior import Call, watched_calls
from luthier.surgery import Base, Batches, TunedView, rows_of
from luthier.surgery.look import Look

__all__ = ["FROM_ROWS", "FromRows", "RowStart", "start_from_rows"]

RowStart = Literal["eva", "corda", "lora_ga"]
FROM_ROWS: tuple[RowStart, ...] = ("eva", "corda", "lora_ga")
DAMP, GAMMA = 0.01, 16
"""Of CorDA: the share of the mean variance that is added to each. Of LoRA-GA: B is scaled by d_out^(1/4) / sqrt(gamma).
Both as in the peft library."""


class FromRows(MovedUpdate):
    """A low-rank update that starts where rows say; until then it does not train."""

    def __init__(self, base: Base, rank: int, scale: float, dropout: float, train: tuple[bool, bool], how: str) -> None:
        weight = base.weight()
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = weight.new_zeros(rank, weight.shape[1], dtype=wide), weight.new_zeros(len(weight), rank, dtype=wide)
        super().__init__(a, b, scale, dropout, train_a=train[0], train_b=train[1])
        self.how = how
        self.__dict__["base"] = base
        self._told = False

    def thin(self) -> tuple[Tensor, Tensor]:
        if self.training and not self._told and not self.a0.is_meta:
            self._told = bool(self.a0.any()) or bool(self.a.any())  # at zero both, nothing would ever move
            if not self._told:
                raise ConfigError(
                    f"start={self.how} takes A and B from rows, and none were seen. Call prepare(tuned, batches) of "
                    "the method before training, as `luthier train` does, or use start=svd."
                )
        return super().thin()

    @torch.no_grad()
    def start_at(self, a: Tensor, b: Tensor) -> None:
        """Begin here: A: (rank, d_in), B: (d_out, rank)."""
        for held, value in ((self.a, a), (self.a0, a), (self.b, b), (self.b0, b)):
            held.copy_(value)


def start_from_rows(start: RowStart, modules: Sequence[FromRows], tuned: TunedView, batches: Batches) -> None:
    """Look at `batches`, and start every module there.

    Raises:
        ConfigError: there are none, or they say too little.
    """
    if not len(batches):
        raise ConfigError(
            f"start={start}: there are no rows to look at. Give some, or use start=svd, which needs none."
        )
    with no_trace(tuned, training=False), kernels.plain(), torch.enable_grad():
        if start == "lora_ga":
            grads = _gradients(modules, batches)
            found = [_by_gradient(module, grad) for module, grad in zip(modules, grads, strict=True)]
        else:
            of = _principal if start == "eva" else _oriented
            sums = _inputs(modules, batches, scaled=start == "corda")
            found = [of(module, seen) for module, seen in zip(modules, sums, strict=True)]
    for module, (a, b) in zip(modules, found, strict=True):
        module.start_at(a, b)


class Inputs(NamedTuple):
    """What a layer has read: how many tokens in how many passes, their sum (d_in,), and that of x x^T (d_in, d_in)."""

    tokens: int
    passes: int
    total: Tensor
    squares: Tensor

    def and_(self, other: "Inputs") -> "Inputs":
        """Of both together."""
        return Inputs(
            self.tokens + other.tokens, self.passes + other.passes, self.total + other.total,
            self.squares + other.squares,
        )  # fmt: skip


def _inputs(modules: Sequence[FromRows], batches: Batches, *, scaled: bool) -> list[Inputs]:
    """Row by row, so that no padding is read. Scaled, each row is divided by its largest entry."""
    sums: list[Inputs | None] = [None] * len(modules)
    for row in (row for batch in batches for row in rows_of(batch)):
        with watched_calls(modules) as seen, torch.no_grad():
            row()
        # What several places read, queries and values say, is summed once: the sums are large.
        together: dict[tuple[Any, ...], Inputs] = {}
        for i, calls in enumerate(seen):
            if calls:
                which = (id(sums[i]), *((call.x.data_ptr(), call.x.shape, call.x.stride()) for call in calls))
                if which not in together:
                    together[which] = _summed(sums[i], calls, scaled=scaled)
                sums[i] = together[which]
    missed = sum(one is None for one in sums)
    if missed:
        raise ConfigError(f"{missed} places of this start were reached by no row. Leave them out of `sites`.")
    return [one for one in sums if one is not None]


def _summed(held: Inputs | None, calls: Sequence[Call], *, scaled: bool) -> Inputs:
    """`held`, and what these calls read."""
    for call in calls:
        x = call.x.flatten(0, -2).double()
        if scaled:
            largest = x.max().abs()
            x = x / largest.where(largest > 0, 1.0)  # behind a ReLU a row may be all zeros
        new = Inputs(len(x), 1, x.sum(0), x.T @ x)
        held = new if held is None else held.and_(new)
    assert held is not None
    return held


def _gradients(modules: Sequence[FromRows], batches: Batches) -> list[Tensor]:
    """The mean over steps of the gradient of the mean loss in each frozen weight, (d_out, d_in)."""
    found: list[Tensor | None] = [None] * len(modules)
    for batch in batches:
        pieces: Sequence[Callable[[], Tensor]] = batch.pieces if isinstance(batch, Look) else (batch,)
        for piece in pieces:
            with watched_calls(modules) as seen:
                loss = piece()
            outs = [call.out for calls in seen for call in calls]
            backs = iter(torch.autograd.grad(loss, outs, allow_unused=True))
            for i, call in ((i, call) for i, calls in enumerate(seen) for call in calls):
                back = next(backs)
                if back is not None:
                    new = _product(back, call) / len(batches)
                    held = found[i]
                    found[i] = new if held is None else held + new
    if any(one is None for one in found):
        raise ConfigError("start=lora_ga: the loss of these rows has no gradient at some places. Leave them out.")
    return [one for one in found if one is not None]


def _product(back: Tensor, call: Call) -> Tensor:
    return back.flatten(0, -2).double().T @ call.x.flatten(0, -2).double()


def _principal(module: FromRows, seen: Inputs) -> tuple[Tensor, Tensor]:
    """EVA: the directions in which what the layer reads varies most; B is zero."""
    rank = len(module.a)
    if seen.tokens <= rank:
        raise ConfigError(f"start=eva: {seen.tokens} tokens say too little for rank {rank}. Let it see more: data=1.")
    mean = seen.total / seen.tokens
    _, vectors = torch.linalg.eigh(seen.squares / seen.tokens - torch.outer(mean, mean))
    return _upright(vectors.T.flip(0)[:rank]), torch.zeros_like(module.b)


def _upright(rows: Tensor) -> Tensor:
    """Rows whose largest entry is positive: their sign is else an accident of the decomposition."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


def _oriented(module: FromRows, seen: Inputs) -> tuple[Tensor, Tensor]:
    """CorDA: the leading part of W C, times the inverse of C, the covariance of what the layer reads."""
    base: Base = module.__dict__["base"]
    covariance = seen.squares / seen.passes
    covariance = covariance + DAMP * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(base.weight().double() @ covariance, full_matrices=False)
    rank = len(module.a)
    root = (s[:rank] / module.scale).sqrt()
    back = torch.linalg.solve(covariance, vt[:rank].T).T  # C is symmetric
    return root[:, None] * back, u[:, :rank] * root


def _by_gradient(module: FromRows, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """LoRA-GA: A from the leading right singular vectors of the gradient, B from the next left ones."""
    rank = len(module.a)
    u, s, vt = torch.linalg.svd(gradient, full_matrices=False)
    grown = len(gradient) ** 0.25 / GAMMA**0.5
    return vt[:rank], u[:, rank : 2 * rank] * s[rank : 2 * rank] * grown

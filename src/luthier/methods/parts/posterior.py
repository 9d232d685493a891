"""A Gaussian over trained matrices: curvature in two factors a matrix, and what it says of a function's outputs."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from luthier.core import ConfigError
from luthier.methods.parts.low_rank import ThinUpdate

__all__ = ["Call", "Posterior", "Root", "evidence_precision", "matrix_gradients", "watched_calls"]

_WIDE, _ROUNDS = 1024, 2


class Call(NamedTuple):
    """One pass through an update: what it read, (rows, tokens, d_in), and what came out, with its graph."""

    x: Tensor
    out: Tensor


@contextmanager
def watched_calls(modules: Sequence[ThinUpdate]) -> Iterator[list[list[Call]]]:
    """Within, each plain pass through one of `modules` is written down in its list, and has a gradient."""
    seen: list[list[Call]] = [[] for _ in modules]

    def watch(module: ThinUpdate, calls: list[Call]) -> None:
        def after(x: Tensor, y: Tensor) -> Tensor:
            out = type(module).after(module, x, y)
            # A tuning that only answers has no tensor that learns: the graph begins here then.
            out = out if out.requires_grad else out.detach().requires_grad_()
            calls.append(Call(x.detach(), out))
            return out

        module.__dict__["after"] = after

    try:
        for module, calls in zip(modules, seen, strict=True):
            watch(module, calls)
        yield seen
    finally:
        for module in modules:
            module.__dict__.pop("after", None)


def matrix_gradients(module: ThinUpdate, x: Tensor, back: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
    """For A and B, what each reads, (rows, tokens, n_in), and the gradient of what it gives, (rows, tokens, n_out).

    `back` (rows, tokens, d_out) is the gradient of the update. Of the matrix itself it is the sum of their products.
    """
    a, b = module.a.detach().float(), module.b.detach().float()
    x, back = x.float(), back.float() * module.scale
    return {"a": (x, back @ b), "b": (x @ a.T, back)}


class Root:
    """The leading directions of a sum of x x^T over rows that come bit by bit.

    Up to a width of 1024 the sum itself is held and decomposed once; above, only so many directions of it, found anew
    with each bit by random projections. Draws are those of the ambient generator.
    """

    def __init__(self, like: Tensor) -> None:
        k, d = like.shape
        self.k, self.whole = k, d <= _WIDE
        self.held = like.new_zeros((d, d) if self.whole else (k, d), dtype=torch.float32)

    def add(self, rows: Tensor) -> None:
        """rows: (n, d)"""
        if self.whole:
            self.held += rows.T @ rows
            return
        both = torch.cat([self.held, rows])
        _, values, vectors = torch.svd_lowrank(both, q=min(self.k + 8, *both.shape), niter=_ROUNDS)
        self.held = values[: self.k, None] * vectors.T[: self.k]

    def rows(self) -> Tensor:
        """(k, d), orthogonal rows, the longest first: their squared lengths are the eigenvalues."""
        if not self.whole:
            return self.held
        values, vectors = torch.linalg.eigh(self.held.double())
        found: Tensor = (values.clamp(min=0).sqrt()[:, None] * vectors.T).flip(0)[: self.k].float()
        return found


class Posterior(nn.Module):
    """N(W, (inputs (x) outputs + precision I)^-1) over one matrix W, (n_out, n_in).

    Each factor is held as the rows of a root, orthogonal to one another: their squared lengths are its eigenvalues.
    Along what no row points to the curvature counts as zero, so that the prior alone speaks there.

    Attributes:
        inputs: (k_in, n_in), of the mean of a a^T over tokens, a what the matrix reads.
        outputs: (k_out, n_out), of the sum of g g^T over tokens and classes, g the gradient of what it gives.
        precision: (1,), of the prior; 0 where nothing has been measured.
    """

    inputs: Tensor
    outputs: Tensor
    precision: Tensor

    def __init__(self, n_out: int, n_in: int, directions: int) -> None:
        super().__init__()
        few = min(n_out, n_in)  # the small side is held whole
        self.register_buffer("inputs", torch.zeros(min(n_in, max(few, directions)), n_in))
        self.register_buffer("outputs", torch.zeros(min(n_out, max(few, directions)), n_out))
        self.register_buffer("precision", torch.zeros(1))

    @staticmethod
    def size(n_out: int, n_in: int, directions: int) -> int:
        """Numbers that it holds."""
        most = max(min(n_out, n_in), directions)
        return min(n_in, most) * n_in + min(n_out, most) * n_out + 1

    @property
    def fitted(self) -> bool:
        """Whether anything has been measured."""
        return bool(self.precision > 0)

    def curvature(self) -> Tensor:
        """The eigenvalues of both factors' product that are not zero by construction. (k_out, k_in), float64"""
        of_outputs, of_inputs = (r.double().square().sum(1) for r in (self.outputs, self.inputs))
        return of_outputs[:, None] * of_inputs

    def covariance(self, jacobian: Tensor, precision: float | None = None) -> Tensor:
        """J Sigma J^T of rows' outputs, also as with another prior.

        jacobian: (rows, outputs, n_out, n_in) -> (rows, outputs, outputs)
        """
        precision = float(self.precision) if precision is None else precision
        of_outputs, of_inputs = _directions(self.outputs), _directions(self.inputs)
        shares = of_outputs @ jacobian @ of_inputs.T  # (rows, outputs, k_out, k_in)
        rest = (jacobian - of_outputs.T @ shares @ of_inputs).flatten(2).double()
        shares = shares.flatten(2).double()
        # Both are sums of squares. Written as the whole less what the data know, large numbers would cancel, and the
        # result need have no root.
        known = shares / (precision + self.curvature().flatten()) @ shares.mT
        return known + rest @ rest.mT / precision


def _directions(root: Tensor) -> Tensor:
    lengths = root.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, root / lengths.clamp(min=torch.finfo(root.dtype).tiny), 0.0)


def evidence_precision(posteriors: Sequence[Posterior], square: float) -> float:
    """The precision of the prior at which the evidence of the data is greatest.

        -precision |W|^2 / 2 - sum log(1 + curvature / precision) / 2

    Where its slope is zero, precision |W|^2 is the number of directions that the data know; it is so at one place.

    Args:
        square: |W|^2, of all matrices.

    Raises:
        ConfigError: there is no curvature, or nothing but zeros: the data say nothing.
    """
    known = torch.cat([p.curvature().flatten() for p in posteriors])
    known = known[known > 0]
    if not len(known) or square <= 0:
        raise ConfigError("the training rows have no curvature, so they say nothing of a prior. Name one: prior=1.")
    low, high = -60.0, 60.0
    for _ in range(200):
        middle = (low + high) / 2
        precision = float(torch.tensor(middle, dtype=torch.float64).exp())
        if precision * square < float((known / (known + precision)).sum()):
            low = middle
        else:
            high = middle
    return float(torch.tensor((low + high) / 2, dtype=torch.float64).exp())

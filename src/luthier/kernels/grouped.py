"""Updates whose numbers stand still: read once, and a different one for every row of a batch.

    one for all rows     y = x Wᵀ + bias + s · x Aᵀ Bᵀ                       copies of A and B made once
    the same of layers that read one x                                      all W and A stacked; or B A inside W
    one for each row     yᵢ = y'ᵢ + s_k · xᵢ A_kᵀ B_kᵀ      k = index[i]     all A stacked, all B stacked, picked by row
    a scale of each row  yᵢ = y'ᵢ · l_k

Nothing here gives a gradient. Ranks that differ are filled up with zeros, which adds nothing; an index past the last
update is a row without one.

Hu et al. 2021 (LoRA), arXiv:2106.09685, section 4.1. Chen et al. 2023 (Punica), arXiv:2310.18547, section 4, has the
picking by row on a GPU.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError
from luthier.kernels.low_rank import Update, _linear
from luthier.kernels.packed import Packed, can_pack
from luthier.kernels.stored import Held

__all__ = ["GroupedScales", "GroupedUpdates", "StillSiblings", "StillUpdate"]

_IN_ONE = 4  # rows up to which one product of wide layers, and copying its parts out, is faster


class StillUpdate:
    """A frozen linear layer and one low-rank update, for as long as neither changes.

    Args:
        weight: (d_out, d_in), packed, or held in codes. bias: (d_out,) or None, of the type of the weight.
        update: copied into the weight's type here; what is written to it later is not seen.
    """

    @torch.inference_mode(False)  # what is packed has to have a version
    @torch.no_grad()
    def __init__(self, weight: Tensor | Packed | Held, bias: Tensor | None, update: Update) -> None:
        self.update, self.scale, self.d_out = update, update.scale, len(weight)
        a = update.a.detach().to(weight.dtype)
        # B as (rank, d_out) rows: a thin product reads it twice as fast so.
        self.b = update.b.detach().to(weight.dtype).T.contiguous()
        self.weight, self.bias, self.a = weight, bias, a.T
        self.joined: Packed | None = None
        if isinstance(weight, Packed):
            # One product gives x Wᵀ and x Aᵀ beside each other: at 32 rows of 384, 61 us in place of 72.
            self.joined = Packed(torch.cat([weight.weight, a]))
            self.bias = None if bias is None else torch.cat([bias, bias.new_zeros(len(a))])

    def __call__(self, x: Tensor) -> Tensor:
        """x: (..., d_in) of the weight's type -> (..., d_out)."""
        rows = x.reshape(-1, x.shape[-1])
        if self.joined is not None:
            both = self.joined.linear(rows, self.bias)
            y = torch.addmm(both[:, : self.d_out], both[:, self.d_out :], self.b, alpha=self.scale)
        else:
            y = _linear(rows, self.weight, self.bias)
            y.addmm_(torch.mm(rows, self.a), self.b, alpha=self.scale)
        return y.view(*x.shape[:-1], self.d_out)


class StillSiblings:
    """Frozen linear layers that read the same rows, each with a low-rank update or none.

        in halves   [y₁ | y₂ | .. | u] = x [W₁; W₂; ..; A]ᵀ + bias     then [y₁ | y₂ | ..] += u B      B block by block
        wider       [y₁ | y₂ | ..] = x [W₁ + s B₁ A₁; W₂; ..]ᵀ + bias

    Half precision would round most of a small update away inside W, so it stays beside; wider types keep it.
    With few rows a product costs its call, so one for all takes half the time; with more, copying the parts out costs
    what it gains, and each wide layer is a product of its own.

    Args:
        layers: for each the weight (d_out, d_in), its bias or None, and its update or None; all of one type. They are
            copied: what is written to them later is not seen.
    """

    @torch.inference_mode(False)  # what is packed has to have a version
    @torch.no_grad()
    def __init__(self, layers: Sequence[tuple[Tensor, Tensor | None, Update | None]]) -> None:
        weights = [weight.detach() for weight, _, _ in layers]
        like, self.sizes = weights[0], [len(weight) for weight in weights]
        self.d_out = sum(self.sizes)
        held = [(i, update) for i, (_, _, update) in enumerate(layers) if update is not None]
        wide = like.dtype in (torch.float32, torch.float64)
        for i, update in held if wide else ():
            a, b = update.a.detach().to(like.dtype), update.b.detach().to(like.dtype)
            weights[i] = torch.addmm(weights[i], b, a, alpha=update.scale)
        thin = [] if wide else [update.a.detach().to(like.dtype) for _, update in held]
        joined = torch.cat([*weights, *thin])
        self.joined = Packed(joined) if can_pack(joined) else joined
        self.bias: Tensor | None = None
        if any(bias is not None for _, bias, _ in layers):
            given = [
                w.new_zeros(len(w)) if b is None else b.detach() for w, (_, b, _) in zip(weights, layers, strict=True)
            ]
            self.bias = torch.cat([*given, like.new_zeros(sum(map(len, thin)))])
        self.apart: list[tuple[Tensor, Tensor | None]] = []
        if wide:
            biases = [None] * len(weights) if self.bias is None else self.bias.split_with_sizes(self.sizes)
            self.apart = list(zip(joined.split_with_sizes(self.sizes), biases, strict=True))
        self.b: Tensor | None = None
        if thin:
            self.b = like.new_zeros(sum(map(len, thin)), self.d_out)
            row = 0
            for i, update in held:
                at, rank = sum(self.sizes[:i]), len(update.a)
                self.b[row : row + rank, at : at + self.sizes[i]] = update.b.detach().T * update.scale
                row += rank

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x: (..., d_in) of the weights' type -> (..., d_out) of each layer, each in memory of its own."""
        if self.apart and x.numel() > _IN_ONE * x.shape[-1]:
            return [F.linear(x, weight, bias) for weight, bias in self.apart]
        both = _linear(x.reshape(-1, x.shape[-1]), self.joined, self.bias)
        y = both[:, : self.d_out]
        if self.b is not None:
            y.addmm_(both[:, self.d_out :], self.b)
        return [part.contiguous().view(*x.shape[:-1], part.shape[1]) for part in y.split_with_sizes(self.sizes, 1)]


class GroupedUpdates:
    """Several low-rank updates of one site, to be picked row by row.

    Args:
        updates: at least one, all of one d_in and d_out; ranks may differ.
        dtype: of the rows. The scale goes into B before it is rounded to this type.

    Raises:
        ConfigError: no update, or widths that differ.
    """

    def __init__(self, updates: Sequence[Update], dtype: torch.dtype) -> None:
        shapes = {(u.a.shape[1], u.b.shape[0]) for u in updates}
        if len(shapes) != 1:
            raise ConfigError(
                f"GroupedUpdates: updates of one site share d_in and d_out; got {sorted(shapes) or 'no update'}."
                " Give at least one, all from the same site."
            )
        ((d_in, d_out),) = shapes
        rank = max(len(u.a) for u in updates)
        like = updates[0].a
        self.a = torch.zeros(len(updates) + 1, rank, d_in, dtype=dtype, device=like.device)
        self.b = torch.zeros(len(updates) + 1, rank, d_out, dtype=dtype, device=like.device)
        with torch.no_grad():
            for i, u in enumerate(updates):
                self.a[i, : len(u.a)] = u.a
                self.b[i, : len(u.a)] = u.b.T * u.scale

    def before(self, x: Tensor, index: Tensor) -> Tensor:
        """x as it is: an update adds to what the layer gives."""
        return x

    def after(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Add every row's own update to y, in place.

        Args:
            x: (rows, n, d_in). y: (rows, n, d_out), both of `dtype`.
            index: (rows,), which update; the number of updates for none.
        """
        a, b = self.a.index_select(0, index), self.b.index_select(0, index)
        return y.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b)


class GroupedScales:
    """Several learned scales of one site, to be picked row by row.

    Args:
        factors: at least one vector of the same width.
        inputs: they scale what the layer reads, not what it gives.
    """

    def __init__(self, factors: Sequence[Tensor], dtype: torch.dtype, *, inputs: bool) -> None:
        with torch.no_grad():
            self.factors = torch.stack([*factors, torch.ones_like(factors[0])]).detach().to(dtype)
        self.inputs = inputs

    def before(self, x: Tensor, index: Tensor) -> Tensor:
        """x: (rows, n, d) scaled, or as it is."""
        return x * self.factors.index_select(0, index)[:, None] if self.inputs else x

    def after(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """y: (rows, n, d) scaled, or as it is."""
        return y if self.inputs else y * self.factors.index_select(0, index)[:, None]

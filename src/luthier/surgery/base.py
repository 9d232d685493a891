"""The frozen layer as a method may see it: `weight()` as (d_out, d_in) and `bias()`, however they are stored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from luthier.anatomy.site import Rows, Site
from luthier.core import AnatomyError
from luthier.kernels import Held, Packed, StoredLinear

__all__ = ["Base", "is_plain", "join_rows", "take_rows"]


def is_plain(stored: Tensor) -> bool:
    """Whether a stored tensor is made of the numbers it stands for: not of integers or float8 with a scale beside."""
    return stored.is_floating_point() and stored.element_size() >= 2


def take_rows(y: Tensor, rows: Rows) -> Tensor:
    """This site's part of a fused output. y: (..., groups * stride) -> (..., groups * width)."""
    if rows.groups == 1:
        return y[..., rows.offset : rows.offset + rows.width]
    grouped = y.reshape(*y.shape[:-1], rows.groups, rows.stride)[..., rows.offset : rows.offset + rows.width]
    # (..., groups, width) -> (..., groups * width)
    return grouped.flatten(-2)


def join_rows(y: Tensor, changed: list[tuple[Rows, Tensor]]) -> Tensor:
    """Replace the parts `changed` of a fused output, by joining pieces.

    Writing the parts into y in place would change a tensor that autograd has saved for the backward pass.
    """
    groups, stride = changed[0][0].groups, changed[0][0].stride
    if groups == 1:
        stride = y.shape[-1]
    grouped = y.reshape(*y.shape[:-1], groups, stride)  # (..., groups, stride)
    pieces, at = [], 0
    for rows, part in sorted(changed, key=lambda c: c[0].offset):
        if rows.offset > at:
            pieces.append(grouped[..., at : rows.offset])
        pieces.append(part.reshape(*part.shape[:-1], groups, rows.width))  # (..., groups, width)
        at = rows.offset + rows.width
    if at < stride:
        pieces.append(grouped[..., at:])
    return torch.cat(pieces, dim=-1).flatten(-2)  # (..., groups * stride)


def _row_index(rows: Rows) -> Tensor:
    steps = torch.arange(rows.groups)[:, None] * rows.stride + rows.offset + torch.arange(rows.width)[None, :]
    return steps.flatten()  # (groups * width,)


class Base:
    """One site's frozen layer. Read-only for methods: what it returns is detached and never a parameter.

    Args:
        neighbours: finds another layer of the same block by the kind of its site and the site's part.
    """

    def __init__(self, module: nn.Module, site: Site, neighbours: Callable[[str, str], Base] | None = None) -> None:
        self.module = module
        self.site = site
        self._neighbours = neighbours
        self.packed: Packed | None = None
        self.moves = False  # a tuning trains the weight itself: nothing computed from it may be kept

    @property
    def stored(self) -> StoredLinear | None:
        """The layer, where its weight is held in codes."""
        return self.module if isinstance(self.module, StoredLinear) and self.site.param == "weight" else None

    @property
    def readable(self) -> bool:
        """Whether `weight()` can be had: all but layers whose scale only they know."""
        return self.stored is not None or is_plain(self.whole_weight())

    def whole_weight(self) -> Tensor:
        """The stored tensor, whole: all rows, all experts; decoded where it is held in codes. For surgery only."""
        weight = getattr(self.module, self.site.param)
        assert isinstance(weight, Tensor)
        return weight

    def whole_bias(self) -> Tensor | None:
        """The stored bias itself, whole. For surgery only."""
        bias = getattr(self.module, self.site.bias) if self.site.bias is not None else None
        return bias if isinstance(bias, Tensor) else None

    @property
    def plain(self) -> bool:
        """Whether the stored weight is what the layer multiplies by, in its own shape; a quantised one is not."""
        if self.stored is not None:
            return False
        stored = getattr(self.module, self.site.param, None)
        if not isinstance(stored, Tensor) or self.site.kind.endswith("_out"):
            return True  # a place, with no weight to read
        shape = (self.site.d_out, self.site.d_in)
        return is_plain(stored) and (self.site.rows is not None or tuple(self.part(stored).shape) == shape)

    def part(self, whole: Tensor, *, bias: bool = False) -> Tensor:
        """This site's part of a stored weight, (d_out, d_in), or of a stored bias, (d_out,)."""
        found = whole if self.site.expert is None else whole[self.site.expert]
        if not bias and self.site.transposed:
            found = found.T  # (d_out, d_in)
        if self.site.rows is not None:
            # Rows of the weight are columns of its transpose: (d_in, d_out) -> (d_in, own d_out) -> (own d_out, d_in)
            found = take_rows(found.T, self.site.rows).T if not bias else take_rows(found, self.site.rows)
        return found

    def put(self, whole: Tensor, value: Tensor, *, bias: bool = False) -> None:
        """The inverse of `part`: write this site's part of a stored weight or bias, in place."""
        target = whole if self.site.expert is None else whole[self.site.expert]
        if not bias and self.site.transposed:
            target = target.T  # (d_out, d_in), of the same memory
        if self.site.rows is None:
            target.copy_(value)
        else:
            target[_row_index(self.site.rows).to(target.device)] = value.to(target.dtype)

    @property
    def device(self) -> torch.device:
        """Where the layer lives."""
        return next(self.stored.buffers()).device if self.stored is not None else self.whole_weight().device

    @property
    def dtype(self) -> torch.dtype:
        """The type the layer is stored in; that in which it is decoded, where it is held in codes."""
        return self.stored.dtype if self.stored is not None else self.whole_weight().dtype

    def weight(self) -> Tensor:
        """(d_out, d_in), in the stored float type.

        Raises:
            AnatomyError: the layer holds integers or float8, whose scale only it knows.
        """
        if not self.readable:
            raise AnatomyError(
                f"{self.site.key}: its weight is quantised ({type(self.module).__name__} holds {self.dtype}), and this "
                "method computes with the weight itself. Use a method that only adds to what a layer gives, such as "
                "lora or parallel_adapter, or load the base in bfloat16."
            )
        return self.part(self.whole_weight().detach())

    def lost(self) -> Tensor | None:
        """What the float weight had and the codes lack: (d_out, d_in) in fp32; None where the weight is a float one.

        Raises:
            AnatomyError: the float weight cannot be had again.
        """
        if self.stored is None:
            return None
        whole = self.original()
        return self.part(whole.T if self.site.transposed else whole) - self.weight().float()  # stored: (d_in, d_out)

    def original(self) -> Tensor:
        """The float weight of a layer that is held in codes, whole: (all d_out, d_in) in fp32.

        Raises:
            AnatomyError: nobody knows where it came from, as for a model that was made small in memory.
        """
        stored = self.stored
        if stored is None or stored.original is None:
            raise AnatomyError(
                f"{self.site.key}: its float weight is needed and not at hand. Load the model with luthier "
                "(--store nf4), which can read the weight again, or start without it (start=zero)."
            )
        return stored.original().float()

    def bias(self) -> Tensor | None:
        """(d_out,), or None where the layer has none."""
        bias = self.whole_bias()
        return None if bias is None else self.part(bias.detach(), bias=True)

    def frozen(self) -> Tensor | Packed | Held:
        """`weight()` for a fused function: packed for fast products, or held in codes. Of whole layers alone."""
        if self.stored is not None:
            return self.stored.held
        return self.packed if self.packed is not None and self.packed.fresh else self.weight()

    def linear(self, x: Tensor) -> Tensor:
        """The frozen map of this site alone. x: (..., d_in) -> (..., d_out)."""
        if self.stored is not None or not self.readable:
            y: Tensor = self.module(x)
            return y if self.site.rows is None else take_rows(y, self.site.rows)
        return torch.nn.functional.linear(x, self.weight(), self.bias())

    def beside(self, kind: str, part: str = "") -> Base:
        """Another layer of the same block, such as its second norm: `beside("norm", "1")`.

        Raises:
            AnatomyError: the block has none.
        """
        if self._neighbours is None:
            raise AnatomyError(
                f"{self.site.key}: this layer was made without the model around it; nothing is beside it."
            )
        return self._neighbours(kind, part)

    def taken(self, x: Tensor) -> Tensor:
        """x in the type that the layer takes: its own; a quantised layer takes any float, and its numbers are none."""
        return x.to(self.dtype) if self.readable else x

    def run(self, x: Tensor) -> Tensor:
        """The layer itself, called in its own type; the result is in that of x. x: (..., d_in) -> (..., d_out).

        A gradient goes through it to x. Edits that stand there do not act: it is the model's layer, with the values
        that it has at the moment.
        """
        y: Tensor = self.module(self.taken(x))
        return y if y.dtype == x.dtype else y.to(x.dtype)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor | None) -> None:
        """Put values back, in the layer's own layout and type. For surgery only."""
        self.put(self.whole_weight(), weight)
        if bias is not None and (whole := self.whole_bias()) is not None:
            self.put(whole, bias, bias=True)

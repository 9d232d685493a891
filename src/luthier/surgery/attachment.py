"""The contract of what sits at a site."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from luthier.core import CannotMerge
from luthier.surgery.base import Base
from luthier.surgery.context import Context

__all__ = ["Attachment", "Together"]


class Together(Protocol):
    """Attachments of several tunings at one site, each row of a batch with its own. Gives no gradient.

    x: (rows, n, d_in)   y: (rows, n, d_out)   index: (rows,), which attachment; their number for none.
    """

    def before(self, x: Tensor, index: Tensor) -> Tensor:
        """Change what the layer reads; x itself where nothing changes."""

    def after(self, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """Change what the layer gives; y may be written to."""


class Attachment(nn.Module):
    """Sits at one site. x: (..., d_in)   y: (..., d_out).

    Several attachments at one site nest like an onion, in the fixed order of their `kind`, never of insertion:

        delta (a change of the weight) → scale → parallel (reads the sublayer's input) → sequential (reads its output)

        f0(x) = W x + b        f1(x) = a1.after(x, f0(a1.before(x)))        f2(x) = a2.after(x, f1(a2.before(x)))

    At a sublayer site (`attn_out`, `ffn_out`) x is the sublayer's input: what the sublayer itself reads, or the
    residual stream, as `reads` says; None where the attachment declares `needs_input = False`. At `block_out` it is
    what the block reads, which `before` may change; `around` may take the block's call over, for one attachment.

    Class facts:
        kind: at most one attachment of a kind may sit at a site.
        reads_base_weight: uses the frozen weight in the forward pass; goes innermost.
        needs_input: at sublayer sites, wants x. An attachment that only changes y says False and costs no tap.
        may_rest: nothing may read what it changes, as behind the last block; the run does not end for want of a
            gradient there.
        per_token: each token's result depends on that token alone, and not on the others of its row.
        keeps_keys: keeps something of each token in the key/value cache: see `Context.cache`.
        reads_whole_text: computes something from a text as a whole, and keeps it for later steps of a generation.
    """

    kind: ClassVar[Literal["delta", "scale", "parallel", "sequential"]] = "delta"
    reads_base_weight: ClassVar[bool] = False
    needs_input: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    may_rest: ClassVar[bool] = False
    reads_whole_text: ClassVar[bool] = False
    keeps_keys: ClassVar[bool] = False

    reads: Literal["input", "residual"] = "input"
    context: Context  # set by surgery: the facts of the current batch

    def before(self, x: Tensor) -> Tensor:
        """Change what the layer reads."""
        return x

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        """Change what the layer gives. `x` is what `before` received, `y` what the layer made of its result."""
        return y

    def around(self, call: Callable[..., Tensor], x: Tensor) -> Tensor:
        """Take over the call of the block that ends at this site (`block_out`). x: (rows, tokens, d), as the result.

        `call(x)` runs the block; `call(x, pick=..., kept=...)` runs it for some tokens of each row, with masks and
        positions following: see `block_run.BlockCall`.
        """
        return call(x)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight (d_out, d_in) and bias that do the same without this attachment.

        Raises:
            CannotMerge: no single weight does the same.
        """
        raise CannotMerge(f"{type(self).__name__} has no closed form in the weights. Serve it attached.")

    def unread(self) -> Tensor | None:
        """(d_in,) bool: inputs that `after` and `merged` never read, so that who gives them may be cut out; or None."""
        return None

    def by_groups(self) -> Tensor | None:
        """(d_out, groups): what the update adds to all weights of a group of 32 inputs alike; None where it does not.

        A base that is held in integers of groups takes such an update into its offsets, and no code of it moves.
        """
        return None

    def fused(self, base: Base, x: Tensor) -> Tensor | None:
        """Layer and attachment in one computation, equal to `after(x, base(before(x)))`; None where it does not pay.

        The socket asks only when this attachment is alone at its site.
        """
        return None

    def still(self, base: Base) -> Callable[[Tensor], Tensor] | None:
        """Layer and attachment in one function that reads the numbers once, while nothing changes; None for none.

        It gets x (..., d_in) of the layer's type, gives no gradient, and equals `after(x, base(before(x)))`.
        """
        return None

    @classmethod
    def together(cls, members: Sequence[Attachment], dtype: torch.dtype) -> Together | None:
        """`members` of this class, of several tunings at one site, as one function of rows of type `dtype`.

        None where there is none: the rows of each tuning are then computed by themselves.
        """
        return None

    # What is stored may differ from what is trained: masks are packed, experts averaged, networks evaluated.
    def stored(self) -> dict[str, Tensor]:
        """The tensors a saved tuning holds, by short names. By default all parameters and persistent buffers."""
        return {name: value.detach() for name, value in self.state_dict().items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the deployed form from what `stored` gave. By default the inverse of `state_dict`."""
        self.load_state_dict(tensors, strict=True)

"""The bottleneck behind a feed-forward layer that reads the stream as its block leaves it.

    post-norm:  v = LN(s + u)    s <- s + A(v)          pre-norm:  v = s + u    s <- s + A(v)

s is what the sublayer gives, u the stream it read, LN the block's own closing norm, frozen: it is computed once for the
adapter and once more, with the same weights, where the block closes.
"""

from typing import Literal

from torch import Tensor, nn

from luthier.anatomy import Anatomy, Site, is_sublayer
from luthier.core import AnatomyError
from luthier.methods.parts.bottleneck import Activation, Bottleneck, check_sublayers
from luthier.surgery import Base

__all__ = ["Behind", "behind_params", "behind_sites", "closing_norm", "reduced", "stream"]


def behind_sites(anatomy: Anatomy, chosen: tuple[str, ...], asked_by: str) -> tuple[Site, ...]:
    """What the feed-forward layers give, or the sublayers that are chosen."""
    found = anatomy.sites(*(chosen or ("ffn_out",)), asked_by=f"{asked_by}.sites", fits=is_sublayer)
    return check_sublayers(found, asked_by)


def closing_norm(anatomy: Anatomy, site: Site, asked_by: str) -> str:
    """Which norm of its block follows a sublayer at once; "" where the block norms before its sublayers.

    Raises:
        AnatomyError: the block has fewer norms than sublayers.
    """
    if anatomy.pre_norm:
        return ""
    block = [s for s in anatomy.all_sites if (s.stack, s.layer) == (site.stack, site.layer)]
    norms = [s.part for s in block if s.kind == "norm"]
    ends = [s.kind for s in block if s.kind in ("attn_out", "cross_out", "ffn_out")]
    if len(norms) != len(ends):
        raise AnatomyError(
            f"{asked_by}: the block of {site.key} has {len(norms)} norms for {len(ends)} sublayers, so it is not known "
            "which one closes which. Use sequential_adapter, which reads no norm."
        )
    return norms[ends.index(site.kind)]


def reduced(site: Site, reduction: int) -> int:
    """Width of a bottleneck that is `reduction` times narrower than the stream."""
    return max(1, site.d_out // reduction)


def behind_params(sites: tuple[Site, ...], reduction: int) -> int:
    """2 d r + r + d for each site."""
    widths = ((site.d_out, reduced(site, reduction)) for site in sites)
    return sum(2 * d * r + r + d for d, r in widths)


def stream(norm: Base | None, x: Tensor, y: Tensor) -> Tensor:
    """v: what the block would give without an adapter. x: what the sublayer read of the stream, y: what it gave."""
    both = y + x
    return both if norm is None else norm.run(both)


class Behind(Bottleneck):
    """Adds a bottleneck of the block's stream to what the sublayer gives."""

    kind = "sequential"
    reads = "residual"

    def __init__(
        self, base: Base, norm: str, width: int, activation: Activation, init: Literal["paper", "zero_up"] = "paper"
    ) -> None:
        super().__init__(base.site.d_out, width, activation)
        self.norm = base.beside("norm", norm) if norm else None  # no module of ours: frozen, and not saved
        for layer in (self.down, self.up):
            nn.init.normal_(layer.weight, std=0.02)
        if init == "zero_up":
            nn.init.zeros_(self.up.weight)

    def after(self, x: Tensor, y: Tensor) -> Tensor:
        return self.add(y, stream(self.norm, x, y))

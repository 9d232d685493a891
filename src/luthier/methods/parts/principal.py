"""The leading singular directions of a frozen weight, exactly, and updates between them."""

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import Thin
from luthier.surgery import Base

__all__ = ["FrozenFrame", "check_principal", "frame_params", "principal"]


def check_principal(rank: int, sites: tuple[Site, ...], setting: str) -> tuple[Site, ...]:
    """Hand `sites` back if the weights of all of them have so many directions.

    Raises:
        ConfigError: with the largest rank that it may be.
    """
    for site in sites:
        most = min(site.d_in, site.d_out)
        if rank > most:
            raise ConfigError(
                f"{setting}: {rank} is above the {most} directions of {site.key}. Set it to {most} or less."
            )
    return sites


def frame_params(rank: int, sites: tuple[Site, ...]) -> int:
    """Numbers of A and B at all of the sites, which are stored and do not train."""
    return sum(rank * (site.d_in + site.d_out) for site in sites)


class FrozenFrame(Thin):
    """Adds `B R A x`; A and B are the weight's own leading directions, and `middle` says what R is.

    B A is their part of the weight. `even`: each has the root of the singular values; else B has them whole. Signs are
    the decomposition's own, so a tuning in this frame stores the frame with it.
    """

    a: Tensor
    b: Tensor
    reads_base_weight = True

    def __init__(self, base: Base, rank: int, dropout: float, *, even: bool = True) -> None:
        super().__init__(1.0, dropout)
        u, s, vt = principal(base, rank)
        self.register_buffer("a", s.sqrt()[:, None] * vt if even else vt)
        self.register_buffer("b", u * s.sqrt() if even else u * s)

    def middle(self) -> Tensor:
        """R: (rank, rank)."""
        raise NotImplementedError

    def thin(self) -> tuple[Tensor, Tensor]:
        middle = self.middle()
        return self.a.to(middle.dtype), self.b.to(middle.dtype) @ middle


def principal(base: Base, rank: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U: (d_out, rank), S: (rank,), V^T: (rank, d_in) of the weight; all of its directions without a rank."""
    weight = base.weight()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    rank = min(wide.shape) if rank is None else rank
    if wide.is_meta:
        return wide.new_empty(len(wide), rank), wide.new_empty(rank), wide.new_empty(rank, wide.shape[1])
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    return u[:, :rank].contiguous(), s[:rank].clone(), vt[:rank].contiguous()

"""The leading singular directions of a frozen weight, exactly, and updates between them."""

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import ConfigError
from luthier.methods.parts.low_rank import Thin
from luthier.surgery import Base

__all__ = ["FrozenFrame", "check_principal", "principal"]


def check_principal(rank: int, site: Site, setting: str) -> None:
    """Refuse a rank that the weight does not have.

    Raises:
        ConfigError: with the largest that it may have.
    """
    most = min(site.d_in, site.d_out)
    if rank > most:
        raise ConfigError(f"{setting}: {rank} is above the {most} directions of {site.key}. Set it to {most} or less.")


def principal(base: Base, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U: (d_out, rank), S: (rank,), V^T: (rank, d_in) of the weight.

    Their signs are the decomposition's own, so a tuning in this frame stores the frame with it.
    """
    weight = base.weight()
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if wide.is_meta:
        return wide.new_empty(len(wide), rank), wide.new_empty(rank), wide.new_empty(rank, wide.shape[1])
    u, s, vt = torch.linalg.svd(wide, full_matrices=False)
    return u[:, :rank].contiguous(), s[:rank].clone(), vt[:rank].contiguous()


class FrozenFrame(Thin):
    """Adds `B R A x`; A and B are the weight's own, and `middle` says what R is."""

    a: Tensor
    b: Tensor
    reads_base_weight = True

    def __init__(self, base: Base, rank: int, dropout: float) -> None:
        super().__init__(1.0, dropout)
        u, s, vt = principal(base, rank)
        self.register_buffer("a", s.sqrt()[:, None] * vt)
        self.register_buffer("b", u * s.sqrt())

    def middle(self) -> Tensor:
        """R: (rank, rank)."""
        raise NotImplementedError

    def thin(self) -> tuple[Tensor, Tensor]:
        middle = self.middle()
        return self.a.to(middle.dtype), self.b.to(middle.dtype) @ middle

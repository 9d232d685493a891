"""The leading singular directions of a frozen weight, exactly, as peft finds them."""

import torch
from torch import Tensor

from luthier.anatomy import Site
from luthier.core import ConfigError
from luthier.surgery import Base

__all__ = ["check_principal", "principal"]


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

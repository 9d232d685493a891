"""An update of chosen entries of a weight, beside the frozen weight itself; and its file in peft."""

import torch
from torch import Tensor, nn

from luthier.anatomy import Site
from luthier.core import ConfigError
from luthier.methods.parts.dense import DenseUpdate

__all__ = ["SparseUpdate", "check_entries"]


def check_entries(sites: tuple[Site, ...], numbers: list[int], setting: str) -> tuple[Site, ...]:
    """Hand `sites` back if each has that many entries, and at least one is chosen.

    Raises:
        ConfigError: with the site and what it has.
    """
    for site, n in zip(sites, numbers, strict=True):
        if not 1 <= n <= site.d_in * site.d_out:
            raise ConfigError(
                f"{setting}: {n} of the {site.d_in * site.d_out} entries of {site.key} would train. Choose at least "
                "one and at most all of them."
            )
    return sites


class SparseUpdate(DenseUpdate):
    """Adds `U x`, where U has `values` (n,) at the places `index` (n,) of the flattened (d_out, d_in), and zeros."""

    index: Tensor

    def __init__(self, index: Tensor, d_in: int, d_out: int) -> None:
        super().__init__()
        self.shape = (d_out, d_in)
        self.values = nn.Parameter(torch.zeros(len(index)))
        self.register_buffer("index", index.to(torch.int32))

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take up what a file holds, whose places have to be entries of the weight."""
        index, n = tensors["index"], self.shape[0] * self.shape[1]
        if index.is_floating_point() or bool(((index < 0) | (index >= n)).any()):
            raise RuntimeError(f"its index names entries that a weight of {n} does not have")
        super().restore(tensors)

    def update(self) -> Tensor:
        flat = self.values.new_zeros(self.shape[0] * self.shape[1])
        return flat.index_add(0, self.index, self.values).view(self.shape)

"""The groups of layer-wise strategies; methods use them too, so they stand in `surgery`."""

from luthier.surgery.layer_groups import layer_groups

__all__ = ["layer_groups"]

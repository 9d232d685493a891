"""The groups of layer-wise strategies; methods use them too, so they stand in `surgery`."""

from luthier.surgery.layer_groups import layer_groups

__all__ = ["is_new", "layer_groups"]


def is_new(name: str) -> bool:
    """Whether a trained tensor belongs to a new head, which has no past to stay near."""
    return name.startswith("head/") or ":head/" in name

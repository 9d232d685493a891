"""One name for every place in any transformer. Read before surgery; needs no weights."""

from luthier.anatomy.anatomy import Anatomy, Attention, Block
from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused
from luthier.anatomy.selection import (
    BySite,
    NumberBySite,
    Selector,
    WholeBySite,
    at_site,
    is_projection,
    is_sublayer,
    joined,
)
from luthier.anatomy.site import KINDS, Rows, Site, layer_in

__all__ = [
    "ARCHITECTURES",
    "KINDS",
    "Anatomy",
    "Architecture",
    "Attention",
    "Block",
    "BySite",
    "Fused",
    "NumberBySite",
    "Rows",
    "Selector",
    "Site",
    "WholeBySite",
    "at_site",
    "is_projection",
    "is_sublayer",
    "joined",
    "layer_in",
]

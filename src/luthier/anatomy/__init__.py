"""One name for every place in any transformer. Read before surgery; needs no weights."""

from luthier.anatomy.anatomy import Anatomy, Attention, Block
from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused
from luthier.anatomy.site import KINDS, Rows, Site

__all__ = ["ARCHITECTURES", "KINDS", "Anatomy", "Architecture", "Attention", "Block", "Fused", "Rows", "Site"]

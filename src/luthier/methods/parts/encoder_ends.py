"""The ends of an encoder's blocks, for methods that must see a row as a whole."""

from luthier.anatomy import Anatomy, Site
from luthier.core import AnatomyError

__all__ = ["encoder_ends"]


def encoder_ends(anatomy: Anatomy, asked_by: str, why: str) -> tuple[Site, ...]:
    """What each block of the encoder, or of the only stack, hands on.

    Args:
        why: what a decoder lacks for it, and what to use there.

    Raises:
        AnatomyError: the model is a decoder.
    """
    if anatomy.is_decoder:
        raise AnatomyError(f"{asked_by}: a {anatomy.model_type} decoder {why}")
    return tuple(s for s in anatomy.sites("block_out", asked_by=asked_by) if s.stack in ("", "encoder"))

"""Fast functions that equal their plain definitions: dropout, fused attachments, attention, loss, optimiser.

Nothing here knows a model, a method or a run. `plain()` (or LUTHIER_PLAIN=1) turns every fast path off.
"""

from luthier.kernels._switch import fast, plain
from luthier.kernels.dropout import KeyedDropout, dropout, keep_mask

__all__ = [
    "KeyedDropout",
    "dropout",
    "fast",
    "keep_mask",
    "plain",
]

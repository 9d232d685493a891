"""Fast functions that equal their plain definitions: dropout, fused attachments, attention, loss, optimiser.

Nothing here knows a model, a method or a run. `plain()` (or LUTHIER_PLAIN=1) turns every fast path off.
"""

from luthier.core.fast_paths import fast, plain
from luthier.kernels.attachments import bottleneck, scale
from luthier.kernels.attention import attend, attention_interface
from luthier.kernels.attention_products import share_of_a_pass
from luthier.kernels.codes import FORMATS, GROUP, Format, Grouped
from luthier.kernels.dropout import dropout, keep_mask
from luthier.kernels.frozen import rms_norm
from luthier.kernels.grouped import GroupedScales, GroupedUpdates, StillSiblings, StillUpdate
from luthier.kernels.loss import linear_cross_entropy, token_losses
from luthier.kernels.low_rank import Update, dora_linear, dora_norm, low_rank_linear, row_squares
from luthier.kernels.optimizer import adamw
from luthier.kernels.packed import Packed, can_pack, packed_linear
from luthier.kernels.stored import Held, StoredLinear

__all__ = [
    "FORMATS",
    "GROUP",
    "Format",
    "Grouped",
    "GroupedScales",
    "GroupedUpdates",
    "Held",
    "Packed",
    "StillSiblings",
    "StillUpdate",
    "StoredLinear",
    "Update",
    "adamw",
    "attend",
    "attention_interface",
    "bottleneck",
    "can_pack",
    "dora_linear",
    "dora_norm",
    "dropout",
    "fast",
    "keep_mask",
    "linear_cross_entropy",
    "low_rank_linear",
    "packed_linear",
    "plain",
    "rms_norm",
    "row_squares",
    "scale",
    "share_of_a_pass",
    "token_losses",
]

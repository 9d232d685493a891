"""ModernBERT: (3, heads, d_head) in one layer; of `Wi` the first half is activated.

The model's code calls the second half "gate". Our `ffn.gate` is the half that goes through the activation.
"""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("modernbert", model_types=("modernbert", "modernbert-decoder"))
class ModernBert(Architecture):
    fused: ClassVar = {
        "Wqkv": Fused(("attn.q", "attn.k", "attn.v")),
        "Wi": Fused(("ffn.gate", "ffn.up")),
    }

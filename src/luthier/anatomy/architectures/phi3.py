"""Phi-3: queries, then fewer keys, then values; the activated half of the feed-forward layer comes first."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("phi3", model_types=("phi3",))
class Phi3(Architecture):
    fused: ClassVar = {
        "qkv_proj": Fused(("attn.q", "attn.k", "attn.v")),
        "gate_up_proj": Fused(("ffn.gate", "ffn.up")),
    }

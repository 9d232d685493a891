"""Phi-3, and GLM for its feed-forward layer: queries, fewer keys, values; the activated half comes first."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("phi3", model_types=("phi3", "glm", "glm4"))
class Phi3(Architecture):
    fused: ClassVar = {
        "qkv_proj": Fused(("attn.q", "attn.k", "attn.v")),
        "gate_up_proj": Fused(("ffn.gate", "ffn.up")),
    }

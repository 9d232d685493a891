"""BLOOM: fused as in GPT-NeoX; the residual sum may take the normed stream."""

from typing import Any, ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("bloom", model_types=("bloom",))
class Bloom(Architecture):
    fused: ClassVar = {"query_key_value": Fused(("attn.q", "attn.k", "attn.v"), layout="per_head")}

    @classmethod
    def residual_is_input(cls, config: Any) -> bool:
        return bool(config.apply_residual_connection_post_layernorm)

"""Mixtral and the models that share its experts: 3-D weights (experts, rows, columns), gate above up."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("mixtral", model_types=("mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"))
class Mixtral(Architecture):
    fused: ClassVar = {"gate_up_proj": Fused(("experts.gate", "experts.up"))}

"""Gemma 4: inputs of its own for each layer come in beside the two sublayers."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("gemma4", model_types=("gemma4_text",))
class Gemma4(Architecture):
    fused: ClassVar = {"gate_up_proj": Fused(("experts.gate", "experts.up"))}
    beside: ClassVar = ("per_layer_input_gate", "per_layer_projection")

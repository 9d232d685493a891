"""DeBERTa-v2 and v3: query and key layers also project the relative positions, so they are called several times."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture


@ARCHITECTURES.register("deberta_v2", model_types=("deberta-v2",))
class DebertaV2(Architecture):
    inputs: ClassVar = {"attn": "attention.self"}
    outside_norms: ClassVar = {"encoder.LayerNorm": "relative"}

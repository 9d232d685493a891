"""GPT-OSS: experts stored as (experts, d_in, d_out); gate and up take turns, column by column."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("gpt_oss", model_types=("gpt_oss",))
class GPTOSS(Architecture):
    fused: ClassVar = {"gate_up_proj": Fused(("experts.gate", "experts.up"), layout="alternating")}

"""GPT-2: one fused layer holds query, key and value, one after the other."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("gpt2", model_types=("gpt2", "openai-gpt"))
class GPT2(Architecture):
    # In a cross-attention the same name holds key and value only; the query has a layer of its own there.
    fused: ClassVar = {"c_attn": Fused(("attn.q", "attn.k", "attn.v"))}

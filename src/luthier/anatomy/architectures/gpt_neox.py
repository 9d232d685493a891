"""GPT-NeoX and Persimmon: the fused layer's rows are (heads, [query, key, value], d_head)."""

from typing import ClassVar

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("gpt_neox", model_types=("gpt_neox", "persimmon"))
class GPTNeoX(Architecture):
    fused: ClassVar = {"query_key_value": Fused(("attn.q", "attn.k", "attn.v"), layout="per_head")}

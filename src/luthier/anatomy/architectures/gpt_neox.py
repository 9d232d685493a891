"""GPT-NeoX: the fused layer's rows are (heads, [query, key, value], d_head)."""

from luthier.anatomy.architecture import ARCHITECTURES, Architecture, Fused


@ARCHITECTURES.register("gpt_neox", model_types=("gpt_neox",))
class GPTNeoX(Architecture):
    fused = {"query_key_value": Fused(("attn.q", "attn.k", "attn.v"), layout="per_head")}

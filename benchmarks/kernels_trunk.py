"""A frozen bf16 trunk forward and backward, by attention function, in one thread: `python benchmarks/kernels_trunk.py`.

Random weights in the shapes of minilm-l6 (32 x 32 and 32 x 128 tokens, a fifth padded) and of smollm2-135m with 6 of
its 30 layers (8 x 256), with the gradient going down to the embeddings. Dropout is off, so that all do the same work.
"""

from collections.abc import Callable

import torch
from _pairs import pair
from transformers import AutoModel, BertConfig, LlamaConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luthier.kernels import attention_interface

ENCODER = BertConfig(
    vocab_size=100, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
)
DECODER = LlamaConfig(
    vocab_size=100,
    hidden_size=576,
    num_hidden_layers=6,
    num_attention_heads=9,
    num_key_value_heads=3,
    intermediate_size=1536,
)


def step(model: PreTrainedModel, way: str, embeds: torch.Tensor, mask: torch.Tensor) -> None:
    """Forward with one attention function, and the gradient of the embeddings."""
    model.set_attn_implementation(way)
    out = model(inputs_embeds=embeds, attention_mask=mask)[0]
    torch.autograd.grad(out, embeds, torch.ones_like(out))


def main() -> None:
    """Print medians and ratios."""
    ALL_ATTENTION_FUNCTIONS.register("luthier", attention_interface)
    ALL_MASK_ATTENTION_FUNCTIONS.register("luthier", sdpa_mask)
    torch.manual_seed(0)
    for config, batch, length in ((ENCODER, 32, 32), (ENCODER, 32, 128), (DECODER, 8, 256)):
        model = AutoModel.from_config(config).to(torch.bfloat16).requires_grad_(False).eval()
        embeds = torch.randn(batch, length, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        mask = torch.ones(batch, length, dtype=torch.long)
        if config is ENCODER:
            mask[::2, -2 * length // 5 :] = 0
        calls: dict[str, Callable[[], object]] = {
            way: lambda m=model, w=way, e=embeds, k=mask: step(m, w, e, k) for way in ("eager", "sdpa", "luthier")
        }
        ms = pair(calls, repeats=7 if length < 128 else 3)
        for way, value in ms.items():
            ratio = value / ms["luthier"]
            print(f"{config.model_type:6} {batch} x {length:4}  {way:8} {value:8.1f} ms  {ratio:5.2f} x ours")


if __name__ == "__main__":
    main()

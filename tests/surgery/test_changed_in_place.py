"""Models that write into what a projection or a norm gave them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from unusual import COMMON, learnt, random_model, word_ids

from luthier import attach, kernels

WIDE = {**COMMON, "hidden_size": 64, "intermediate_size": 96}


def longformer() -> Any:
    settings = {**WIDE, "max_position_embeddings": 66, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = hf.LongformerConfig(**settings, attention_window=[4, 4], num_labels=3)
    return random_model(hf.LongformerForSequenceClassification, config)


def led() -> Any:
    config = hf.LEDConfig(
        vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=96, decoder_ffn_dim=96, attention_window=4,
        max_encoder_position_embeddings=64, max_decoder_position_embeddings=64, dropout=0.0, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return random_model(hf.LEDForConditionalGeneration, config)


def falcon() -> Any:
    config = hf.FalconConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, ffn_hidden_size=96,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return random_model(hf.FalconForCausalLM, config)


def olmo() -> Any:
    return random_model(hf.OlmoForCausalLM, hf.OlmoConfig(**WIDE, num_key_value_heads=2, clip_qkv=8.0))


def olmoe() -> Any:
    config = hf.OlmoeConfig(**WIDE, num_key_value_heads=2, clip_qkv=8.0, num_experts=4, num_experts_per_tok=2)
    return random_model(hf.OlmoeForCausalLM, config)


CASES: list[tuple[Callable[[], Any], str, dict[str, Any], bool]] = [
    (longformer, "lora", {}, False),
    (led, "dora", {}, False),
    (falcon, "sequential_adapter", {}, False),
    (falcon, "lora", {"sites": ["ffn.down"]}, False),
    (olmo, "lora", {}, False),
    (olmo, "ia3", {}, False),
    (olmoe, "bitfit", {"add_missing_biases": True}, True),
]


@pytest.mark.parametrize(("build", "method", "settings", "quick"), CASES)
def test_a_model_that_writes_into_a_projections_output_trains_as_by_the_plain_formulas(
    build: Callable[[], Any], method: str, settings: dict[str, Any], quick: bool
) -> None:
    ids, found = word_ids(2, 12), []
    for by_formula in (True, False):
        model = build()
        tuned = learnt(attach(model, method, **settings), 0.05)
        if quick and not by_formula:
            tuned.fast.accelerate()
        labels = torch.tensor([0, 2]) if build is longformer else ids
        with kernels.plain(by_formula):
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
            loss.backward()
        found.append((loss.detach(), {k: p.grad for k, p in tuned.trained().items() if p.grad is not None}))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-4, rtol=1e-3)

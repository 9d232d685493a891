"""Trained numbers of reparameterised methods on models of real size, on the meta device."""

import pytest
from methods.test_counts import ENCODER_ALL, _counts


@pytest.mark.parametrize(
    ("model", "method", "settings", "trained"),
    [
        ("roberta", "oft", {"block": 32}, 285_696),
        ("llama-7b", "oft", {"block": 32}, 4_063_232),
        ("roberta", "boft", {"block": 8, "factors": 2}, 24 * (2 * 768 * 8 + 768)),
        ("roberta", "vera", {"rank": 1024}, 43_008),
        ("llama-7b", "vera", {"rank": 256, "sites": ENCODER_ALL}, 1_417_216),
        ("roberta", "loha", {}, 589_824),
        ("llama-7b", "loha", {}, 8_388_608),
        ("roberta", "lora_fa", {}, 147_456),
        ("roberta", "qlora", {}, 10_616_832),
        ("llama-7b", "qlora", {}, 159_907_840),
        ("roberta", "qa_lora", {}, 5_474_304),
        ("llama-7b", "qa_lora", {}, 89_309_184),
        ("roberta", "loftq", {}, 2_654_208),
        ("llama-7b", "loftq", {}, 39_976_960),
        ("llama-7b", "lora_fa", {"rank": 64, "sites": ENCODER_ALL}, 87_031_808),
        ("roberta", "pissa", {}, 294_912),
        ("roberta", "sora", {"sites": ENCODER_ALL}, 1_327_680),
        ("llama-7b", "sora", {"sites": ENCODER_ALL}, 19_990_272),
        ("roberta", "increlora", {"sites": ENCODER_ALL, "most": 2}, 331_920),
        ("llama-7b", "increlora", {"sites": ENCODER_ALL, "most": 2}, 4_997_568),
        ("llama-7b", "longlora", {}, 139_726_848),
        ("llama-7b", "moelora", {"tasks": 5}, 8_388_608 + 64 * (8 + 5)),
        ("roberta", "dylora", {}, 294_912),
        ("roberta", "loraprune", {}, 1_327_104),
        ("llama-7b", "loraprune", {}, 19_988_480),
        ("roberta", "lily", {}, 2 * (6 * 16 * 768 + 3 * 16 * (768 + 12))),
        ("roberta", "frod", {}, 24 * (768 + 5898)),
        ("roberta", "delta_lora", {}, 294_912),
        ("llama-7b", "delta_lora", {}, 4_194_304),
        ("roberta", "kernel_mix", {}, 24 * (2 * 1536 + 12 * 768 + 768)),
        ("roberta", "miss", {"rank": 64}, 24 * 64 * 768),
        ("roberta", "gralora", {"rank": 32}, 32 * 24 * 1536),
        ("roberta", "delora", {}, 294_912 + 24),
        ("roberta", "hira", {"rank": 8}, 294_912),
        ("roberta", "randlora", {"rank": 32}, 24 * 24 * (32 + 768)),
        ("roberta", "hra", {}, 24 * 8 * 768),
        ("roberta", "road", {}, 24 * 768),
        ("roberta", "c3a", {}, 24 * 768 * 768 // 128),
        ("roberta", "waveft", {}, 24 * 2592),
        ("roberta", "fourierft", {}, 24_000),
        ("llama-7b", "fourierft", {}, 64_000),
    ],
)
def test_trained_numbers(model, method, settings, trained):
    assert _counts(model, method, **settings)[0] == trained

"""Trained and stored numbers on models of real size, on the meta device: no weights are needed."""

from functools import cache

import pytest
import torch
import transformers as hf

from luthier.anatomy import Anatomy
from luthier.surgery import METHODS, attach

HEAD = 592_130  # RoBERTa's head for two labels: 768² + 768 + 2 · 768 + 2
MODELS = {
    "roberta": (
        hf.RobertaForSequenceClassification,
        hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, num_labels=2),
    ),
    "bert": (hf.BertModel, hf.BertConfig()),
    "llama-7b": (hf.LlamaForCausalLM, hf.LlamaConfig(tie_word_embeddings=False)),
}


def _model(name):
    cls, config = MODELS[name]
    with torch.device("meta"):
        return cls(config)


@cache
def _anatomy(name):
    return Anatomy.read(_model(name))


def _counts(name, method, **settings):
    made = METHODS.get(method)(**settings)
    return made.n_params(_anatomy(name)), made.n_stored(_anatomy(name))


ENCODER_ALL = ("attn", "ffn")


@pytest.mark.parametrize(
    ("model", "method", "settings", "trained"),
    [
        ("roberta", "lora", {"rank": 8}, 294_912),
        ("roberta", "lora", {"rank": 64, "sites": ENCODER_ALL}, 10_616_832),
        ("llama-7b", "lora", {"rank": 8}, 4_194_304),
        ("llama-7b", "lora", {"rank": 64, "sites": ENCODER_ALL}, 159_907_840),
        ("roberta", "dora", {"rank": 32, "sites": ("attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down")}, 4_792_320),
        ("llama-7b", "dora", {"rank": 32, "sites": ("attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down")}, 56_975_360),
        ("roberta", "adalora", {}, 442_656),
        ("roberta", "adalora", {"sites": ENCODER_ALL}, 1_991_520),
        ("llama-7b", "adalora", {}, 6_292_224),
        # The catalogue's 27,263,872 has C, D and E too, which layers without a bias are not given.
        ("llama-7b", "glora", {"sites": ("*",)}, 2 * 4 * 32 * 78_080),
        ("llama-7b", "adalora", {"sites": ENCODER_ALL}, 29_985_408),
        ("bert", "ia3", {}, 55_296),
        ("bert", "bitfit", {"embeddings": False}, 101_376),
        ("bert", "bitfit", {}, 102_912),
        ("bert", "bitfit", {"subset": True}, 46_080),
        ("roberta", "bitfit", {}, 102_144),
        ("bert", "full", {}, 109_482_240),
        ("bert", "head_only", {"pooler": True}, 590_592),
        ("bert", "diff_pruning", {}, 218_964_679),
        ("bert", "child_tuning_d", {}, 25_516_339 + 109_482_240 - 85_054_464),
        ("roberta", "intrinsic_said", {"dimension": 1608}, 1608),
        ("roberta", "adamix", {"width": 48}, 2_223_360),
        ("roberta", "adamix", {"width": 16}, 747_264),
        ("roberta", "adamix", {"width": 48, "up_experts": 4}, 3_578_112),
        ("llama-7b", "adamix", {"width": 48}, 31_594_496),
        ("roberta", "adamix", {"form": "lora", "up_experts": 4}, 1_179_648),
        ("roberta", "propetl", {}, 1_278_784),
        ("roberta", "krona", {}, 36_864),
        ("llama-7b", "krona", {}, 524_288),
        ("roberta", "krona_b", {}, 18_432),
        ("roberta", "krona_b_res", {}, 18_432 + 12),
        ("roberta", "lokr", {}, 26_112),
        ("roberta", "phm_delta", {"n": 4, "rank": 1}, 64 + 24 * 1536),
        ("roberta", "kadaptation", {}, 2 * 32**2 + 24 * 1536),
        ("llama-7b", "propetl", {"width": 341}, 2_797_909 + 89_391_104),
    ],
)
def test_trained_numbers(model, method, settings, trained):
    assert _counts(model, method, **settings)[0] == trained


@pytest.mark.parametrize(
    ("model", "method", "settings", "stored"),
    [
        ("roberta", "adalora", {"sites": ENCODER_ALL}, 1_327_680),
        ("bert", "diff_pruning", {}, 2 * 547_411),  # each value with its place
        ("roberta", "adamix", {"width": 48}, 894_528),
        ("roberta", "adamix", {"width": 16}, 304_320),
        ("llama-7b", "adamix", {"width": 48}, 12_715_520),
        ("roberta", "adamix", {"form": "lora", "up_experts": 4}, 294_912),
        ("roberta", "propetl", {}, 99_136 + 147_456),  # the masks count by their bytes
        ("roberta", "lora", {}, 294_912),
    ],
)
def test_stored_numbers(model, method, settings, stored):
    assert _counts(model, method, **settings)[1] == stored


@pytest.mark.parametrize(
    ("method", "settings", "total"),
    [("lora", {"rank": 8}, 887_042), ("adalora", {}, 1_034_786), ("bitfit", {}, 694_274), ("propetl", {}, 1_870_914)],
)
def test_published_totals_of_roberta_with_its_head_agree_with_what_is_attached(method, settings, total):
    model = _model("roberta")
    tuned = attach(model, method, **settings)
    assert tuned.n_trained() + HEAD == total
    assert tuned.n_trained(head=True) == total
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == total


def test_the_blocks_of_bert_hold_what_child_tuning_chooses_from():
    anatomy = _anatomy("bert")
    inside = tuple(f"{b.path}." for b in anatomy.blocks)
    total = sum(torch.Size(s).numel() for n, s in anatomy.tensors.items() if n.startswith(inside))
    assert total == 85_054_464
    assert len(anatomy.tensors) == 199

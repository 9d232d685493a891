"""Classifiers whose trunk does not stand where their class says."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from unusual import COMMON, IMAGE, WHISPER, learnt, random_model, word_ids

from luthier.core import AnatomyError
from luthier.surgery import attach, load

TEXT = {**COMMON, "max_position_embeddings": 24}
PICTURE = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SOUND = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
T5 = {
    "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 128, "pad_token_id": 0,
    "decoder_start_token_id": 0,
}  # fmt: skip


def vit(seed: int = 0) -> Any:
    return random_model(hf.ViTForImageClassification, hf.ViTConfig(**IMAGE, num_labels=5), seed)


def clip(seed: int = 0) -> Any:
    config = hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, num_labels=5)
    return random_model(hf.CLIPForImageClassification, config, seed)


def siglip(seed: int = 0) -> Any:
    config = hf.SiglipConfig(text_config=TEXT, vision_config=IMAGE, num_labels=5)
    return random_model(hf.SiglipForImageClassification, config, seed)


def whisper(seed: int = 0) -> Any:
    config = hf.WhisperConfig(**WHISPER, num_labels=5, classifier_proj_size=16, use_weighted_layer_sum=True)
    return random_model(hf.WhisperForAudioClassification, config, seed)


def t5(seed: int = 0) -> Any:
    return random_model(hf.T5ForQuestionAnswering, hf.T5Config(**T5), seed)


HEADS = {
    vit: ({"pixel_values": PICTURE}, ["classifier.bias", "classifier.weight"]),
    clip: ({"pixel_values": PICTURE}, ["classifier.bias", "classifier.weight"]),
    siglip: ({"pixel_values": PICTURE}, ["classifier.bias", "classifier.weight"]),
    whisper: (
        {"input_features": SOUND},
        ["classifier.bias", "classifier.weight", "layer_weights", "projector.bias", "projector.weight"],
    ),
    t5: ({"input_ids": word_ids()}, ["qa_outputs.bias", "qa_outputs.weight"]),
}


@pytest.mark.parametrize("build", HEADS)
def test_a_new_head_trains_is_stored_and_comes_back_whatever_name_the_trunk_has(build: Any, tmp_path: Path) -> None:
    batch, names = HEADS[build]
    model = build()
    tuned = learnt(attach(model, "lora"))
    assert sorted(k.removeprefix("head/") for k in tuned.trained() if k.startswith("head/")) == names
    model(**batch)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tuned.trained().values())
    tuned.save(tmp_path / "t")
    other = build()
    with torch.no_grad():  # a head of a fresh model is random
        for name in names:
            other.get_parameter(name).add_(1.0)
    load(other, tmp_path / "t")
    with torch.no_grad():
        assert torch.equal(other(**batch)[0], model(**batch)[0])


class FlatForSequenceClassification(hf.BertPreTrainedModel):  # type: ignore[misc]
    """Embeddings, layers and head side by side, and nothing under `base_model_prefix`."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        parts = hf.BertModel(config)
        self.embeddings, self.layers = parts.embeddings, parts.encoder.layer
        self.scores = nn.Linear(config.hidden_size, 3)

    def forward(self, input_ids: Any) -> Any:
        states = self.embeddings(input_ids)
        for layer in self.layers:
            states = layer(states)
        return (self.scores(states[:, 0]),)


def test_a_classifier_that_cannot_be_told_from_its_trunk_is_refused_until_the_new_tensors_are_named() -> None:
    model = random_model(FlatForSequenceClassification, hf.BertConfig(**COMMON))
    before = list(model.state_dict())
    with pytest.raises(AnatomyError, match="new_tensors=") as told:
        attach(model, "lora")
    assert "scores.bias" in str(told.value) and list(model.state_dict()) == before
    without = attach(model, "lora", train_head=False)
    assert not any(k.startswith("head/") for k in without.trained())
    without.detach()
    tuned = attach(model, "lora", new_tensors=["scores.weight", "scores.bias"])
    assert {"head/scores.weight", "head/scores.bias"} <= set(tuned.trained())

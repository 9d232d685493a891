"""Sequential adapter: its own tests, beside those that every method passes."""

import copy

import pytest
import torch
from methods.checks import frozen_copy, logits, same, train
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from transformers import BertConfig, BertModel

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError
from luthier.surgery import attach, method

NAMES = ["bert", "llama", "t5"]


@pytest.mark.acid("sequential_adapter", 1)
@pytest.mark.parametrize("name", NAMES)
def test_with_a_second_layer_of_zeros_it_starts_at_the_base(name):
    model = tiny(name)
    base = logits(model)
    attach(model, "sequential_adapter", width=7, init="zero_up")
    assert torch.equal(logits(model), base)


def test_the_start_of_the_paper_is_near_the_base_and_cut_at_two_deviations():
    model = tiny("bert")
    base = logits(model)
    tuned = attach(model, "sequential_adapter", width=7)
    assert 0 < (logits(model) - base).abs().max() < 1e-3
    for module in tuned.modules().values():
        assert 0 < module.down.weight.abs().max() <= 2e-3
        assert torch.count_nonzero(module.up.bias) == 0


def _scaled(model, factor):
    """The same model with what its sublayers give times `factor`, before residual sum and norm."""
    other = copy.deepcopy(model)
    for layer in other.bert.encoder.layer:
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight.data *= factor
            dense.bias.data *= factor
    return other


@pytest.mark.acid("sequential_adapter", 2)
def test_a_known_map_acts_before_the_residual_sum_and_the_norm():
    plain = tiny("bert")
    expected = logits(_scaled(plain, 1.25))
    tuned = attach(tiny("bert"), "sequential_adapter", width=48, activation="identity", train_norms=False)
    with torch.no_grad():
        for module in tuned.modules().values():
            module.down.weight.copy_(torch.eye(48))
            module.up.weight.copy_(0.25 * torch.eye(48))
    torch.testing.assert_close(logits(tuned.model), expected, rtol=1e-5, atol=1e-5)
    after_the_norm = copy.deepcopy(plain)
    for layer in after_the_norm.bert.encoder.layer:
        for norm in (layer.attention.output.LayerNorm, layer.output.LayerNorm):
            norm.weight.data *= 1.25
            norm.bias.data *= 1.25
    assert (logits(after_the_norm) - expected).abs().max() > 1e-3


@pytest.mark.acid("sequential_adapter", 3)
def test_two_adapters_and_four_norm_vectors_per_block_train_and_nothing_else():
    tuned = attach(tiny("bert"), "sequential_adapter", width=7, train_norms=True)
    assert len(tuned.modules()) == 2 * 3
    held = [u.name for k, u in tuned.tuning().unfrozen.items() if not k.startswith("head/")]
    assert len(held) == 4 * 3 and all("LayerNorm" in n and ".layer." in n for n in held)
    before = frozen_copy(tuned)
    losses = train(tuned, 4)
    assert losses[-1] != losses[0]
    assert same(dict(tuned.model.named_parameters()), before)


@pytest.mark.acid("sequential_adapter", 4)
def test_the_adapter_behind_attention_matters():
    tuned = stirred("bert", "sequential_adapter", width=7)
    whole = logits(tuned.model)
    for key, module in tuned.modules().items():
        if key.startswith("attn_out"):
            torch.nn.init.zeros_(module.up.weight)
            torch.nn.init.zeros_(module.up.bias)
    assert (logits(tuned.model) - whole).abs().max() > 1e-3


def test_norms_and_biases_are_not_decayed():
    tuned = attach(tiny("bert"), "sequential_adapter", width=7)
    (group,) = tuned.groups()
    assert group.weight_decay == 0.0
    names = set(tuned.trained())
    assert set(group.names) <= names
    left = {n for n in names - set(group.names) if not n.startswith("head/")}
    assert len(left) == 2 * 2 * 3 and all(n.endswith("weight") for n in left)


def test_bert_base_trains_the_numbers_of_the_paper():
    with torch.device("meta"):
        anatomy = Anatomy.read(BertModel(BertConfig()))
    count = lambda **settings: method("sequential_adapter", settings).n_params(anatomy)
    assert count(width=64) == 2_416_128
    assert count(width=64, embedding_norm=True) == 2_417_664
    assert count(width=48, train_norms=False) == 1_789_056


def test_a_model_without_a_norm_behind_its_embeddings_says_so():
    with pytest.raises(AnatomyError, match="no norm behind its embeddings"):
        attach(tiny("llama"), "sequential_adapter", embedding_norm=True)


def test_cross_attention_can_be_closed_too():
    tuned = attach(tiny("t5"), "sequential_adapter", width=7, cross=True)
    assert sum(k.startswith("cross_out") for k in tuned.modules()) == 2
    assert torch.isfinite(tuned.model(**inputs(tuned.model)).loss)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "sequential_adapter", width=7), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "sequential_adapter", width=7))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "sequential_adapter", width=7)

"""Parallel adapter: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, contribution, logits, read_by, stir
from methods.generation import check_checkpointing, check_generation, check_low_precision, stirred
from tiny import inputs, tiny
from transformers import BertConfig, BertModel

from luthier.anatomy import Anatomy
from luthier.methods.parts.parallel_branch import Beside
from luthier.surgery import attach, method

NAMES = ["bert", "llama", "t5"]


@pytest.mark.acid("parallel_adapter", 1)
@pytest.mark.parametrize("placement", ["ffn", "attn", "both"])
@pytest.mark.parametrize("name", [*NAMES, "opt", "bloom"])
def test_it_starts_at_the_base_with_its_branch_running(name, placement):
    model = tiny(name)
    base = logits(model)
    tuned = attach(model, "parallel_adapter", width=7, placement=placement)
    assert all(torch.count_nonzero(m.down.weight) > 0 for m in tuned.modules().values())
    assert torch.equal(logits(model), base)


@pytest.mark.acid("parallel_adapter", 2)
def test_twice_the_scale_adds_twice_as_much_before_the_norm():
    added = []
    for scale in (2.0, 4.0):
        tuned = attach_double("bert", "parallel_adapter", width=7, scale=scale)
        stir(tuned)
        norm = tuned.model.bert.encoder.layer[0].output.LayerNorm
        added.append(contribution(tuned, norm, "ffn_out@0"))
    assert added[0].abs().max() > 1e-2
    torch.testing.assert_close(added[1], 2 * added[0], rtol=1e-10, atol=1e-10)


@pytest.mark.acid("parallel_adapter", 3)
def test_it_reads_the_input_of_the_feed_forward_layer_not_its_output():
    tuned = attach_double("bert", "parallel_adapter", width=7)
    stir(tuned)
    layer = tuned.model.bert.encoder.layer[0]
    before = contribution(tuned, layer.output.LayerNorm, "ffn_out@0")
    for dense in (layer.intermediate.dense, layer.output.dense):
        torch.nn.init.zeros_(dense.weight)
        torch.nn.init.zeros_(dense.bias)
    torch.testing.assert_close(contribution(tuned, layer.output.LayerNorm, "ffn_out@0"), before, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reads", ["residual", "normed"])
def test_before_or_behind_the_norm_as_the_setting_says(reads):
    tuned = attach_double("llama", "parallel_adapter", width=7, reads=reads)
    stir(tuned)
    layer = tuned.model.model.layers[0]
    module = tuned.modules()["ffn_out@0"]
    stream = read_by(layer.post_attention_layernorm, tuned.model)
    z = stream if reads == "residual" else layer.post_attention_layernorm(stream)
    expected = 4.0 * (torch.relu(z @ module.down.weight.T + module.down.bias) @ module.up.weight.T + module.up.bias)
    norm = tuned.model.model.layers[1].input_layernorm
    torch.testing.assert_close(contribution(tuned, norm, "ffn_out@0"), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("placement", ["ffn", "attn", "both"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_it_stands_beside_the_sublayers_that_the_placement_names(name, placement):
    tuned = attach_double(name, "parallel_adapter", width=7, placement=placement, scale=2.0)
    stir(tuned)
    sites = {"ffn": {"ffn_out"}, "attn": {"attn_out"}, "both": {"ffn_out", "attn_out"}}[placement]
    assert {k.partition("@")[0] for k in tuned.modules()} == sites
    # Each branch adds its formula of the sublayer's input to what the residual sum behind that sublayer gives.
    if name == "bert":
        layer = tuned.model.bert.encoder.layer[0]
        places = {
            "attn_out": (layer.attention.self.query, layer.attention.output.LayerNorm),
            "ffn_out": (layer.intermediate.dense, layer.output.LayerNorm),
        }
    else:
        layer, following = tuned.model.model.layers[0], tuned.model.model.layers[1]
        places = {
            "attn_out": (layer.input_layernorm, layer.post_attention_layernorm),
            "ffn_out": (layer.post_attention_layernorm, following.input_layernorm),
        }
    for site in sites:
        reader, behind = places[site]
        module, z = tuned.modules()[f"{site}@0"], read_by(reader, tuned.model)
        inner = torch.relu(z @ module.down.weight.T + module.down.bias)
        expected = 2.0 * (inner @ module.up.weight.T + module.up.bias)
        torch.testing.assert_close(contribution(tuned, behind, f"{site}@0"), expected.detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_in_training_its_bottleneck_is_dropped_and_nothing_else(share):
    branch = Beside(6, 9, "relu", scale=3.0, dropout=share).double().train()
    torch.nn.init.normal_(branch.up.weight)
    torch.nn.init.normal_(branch.up.bias)
    x, y = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    torch.manual_seed(11)
    found = branch.after(x, y)
    torch.manual_seed(11)
    inner = torch.relu(x @ branch.down.weight.T + branch.down.bias)
    kept = torch.empty_like(inner).bernoulli_(1 - share)
    expected = y + 3.0 * ((inner * kept / (1 - share)) @ branch.up.weight.T + branch.up.bias)
    assert 0 < int((kept == 0).sum()) < kept.numel()
    torch.testing.assert_close(found, expected)
    branch.eval()
    torch.testing.assert_close(branch.after(x, y), y + 3.0 * (inner @ branch.up.weight.T + branch.up.bias))


def test_a_learned_scale_is_one_more_number_and_moves():
    tuned = attach(tiny("bert"), "parallel_adapter", width=7, learn_scale=True, scale=1.0)
    assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy) == 3 * (2 * 48 * 7 + 7 + 48 + 1)
    stir(tuned)
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(float(p.grad.abs()) > 0 for n, p in tuned.trained().items() if n.endswith("scale"))


def test_bert_base_trains_the_numbers_of_the_catalogue():
    with torch.device("meta"):
        anatomy = Anatomy.read(BertModel(BertConfig()))
    counts = {w: method("parallel_adapter", {"width": w}).n_params(anatomy) for w in (512, 384, 16)}
    assert counts == {512: 9_452_544, 384: 7_091_712, 16: 304_320}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation_does_not_depend_on_cache_or_padding(name, beams):
    check_generation(stirred(name, "parallel_adapter", width=7, placement="both"), beams)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_blocks_give_the_same_gradients(name):
    check_checkpointing(stirred(name, "parallel_adapter", width=7, placement="both"))


def test_a_bf16_model_trains_fp32_numbers():
    check_low_precision("llama", "parallel_adapter", width=7)

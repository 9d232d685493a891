"""Pfeiffer adapter: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, counted, frozen_copy, logits, read_by, same, stir, train
from tiny import tiny

from luthier.core import AnatomyError
from luthier.surgery import attach


def test_its_numbers_on_bert_base_are_those_of_the_paper():
    assert counted("pfeiffer_adapter") == 894_528


@pytest.mark.acid("pfeiffer_adapter", 1)
def test_the_closing_norm_acts_twice_a_block_and_once_asleep():
    tuned = attach(tiny("bert"), "pfeiffer_adapter", reduction=8)
    calls = []
    for layer in tuned.model.bert.encoder.layer:
        layer.output.LayerNorm.register_forward_hook(lambda module, args, out: calls.append(id(module)))
    logits(tuned.model)
    assert [calls.count(number) for number in dict.fromkeys(calls)] == [2, 2, 2]
    calls.clear()
    with tuned.base_only():
        logits(tuned.model)
    assert [calls.count(number) for number in dict.fromkeys(calls)] == [1, 1, 1]


@pytest.mark.acid("pfeiffer_adapter", 2)
def test_a_block_is_what_the_equation_says_and_not_what_reading_the_sublayer_alone_gives():
    tuned = attach_double("bert", "pfeiffer_adapter", reduction=8)
    stir(tuned)
    layer = tuned.model.bert.encoder.layer[1]
    module = tuned.modules()["ffn_out@1"]
    u, norm = read_by(layer.intermediate.dense, tuned.model), layer.output.LayerNorm
    s = layer.output.dense(torch.nn.functional.gelu(layer.intermediate.dense(u)))

    def adapter(v):
        hidden = torch.relu(v @ module.down.weight.T + module.down.bias)
        return hidden @ module.up.weight.T + module.up.bias

    found = read_by(tuned.model.bert.encoder.layer[2].attention.self.query, tuned.model)
    wanted, other = (norm(s + adapter(v) + u).detach() for v in (norm(s + u), s))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert (found - other).abs().max() > 1e-3


def test_in_a_model_that_norms_first_it_reads_the_stream_itself():
    tuned = attach_double("llama", "pfeiffer_adapter", reduction=8)
    stir(tuned)
    layer, module = tuned.model.model.layers[0], tuned.modules()["ffn_out@0"]
    u = read_by(layer.post_attention_layernorm, tuned.model)
    v = u + layer.mlp.base(layer.post_attention_layernorm(u))
    hidden = torch.relu(v @ module.down.weight.T + module.down.bias)
    found = read_by(tuned.model.model.layers[1].input_layernorm, tuned.model)
    torch.testing.assert_close(found, (v + hidden @ module.up.weight.T + module.up.bias).detach(), rtol=1e-9, atol=1e-9)


@pytest.mark.acid("pfeiffer_adapter", 3)
def test_its_norms_stay_frozen_under_decay():
    tuned = attach(tiny("bert"), "pfeiffer_adapter", reduction=8)
    before = frozen_copy(tuned)
    assert any("LayerNorm" in name for name in before)
    train(tuned, 3, decay=0.1)
    assert same(dict(tuned.model.named_parameters()), {f"{n}": t for n, t in before.items()})
    assert not any("norm" in name.lower() for name in tuned.trained())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_with_a_second_layer_of_zeros_it_starts_at_the_base(name):
    model = tiny(name)
    base = logits(model)
    attach(model, "pfeiffer_adapter", reduction=8, init="zero_up")
    assert torch.equal(logits(model), base)


def test_a_place_that_ends_no_sublayer_is_refused():
    with pytest.raises(AnatomyError, match=r"pfeiffer_adapter\.sites: attn\.q@0 is not what a sublayer gives"):
        attach(tiny("bert"), "pfeiffer_adapter", sites=["attn.q"])

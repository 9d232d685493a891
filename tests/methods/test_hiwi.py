"""HiWi: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir, train
from methods.sizes import stored, trained
from tiny import inputs, tiny

from luthier.core import AnatomyError, ConfigError
from luthier.methods.additive.hiwi import Hidden
from luthier.surgery import attach
from luthier.surgery.tuning_files import stored_tensors


@pytest.mark.acid("hiwi", 2)
def test_counts_are_those_of_the_catalogue_and_storage_knows_no_rank():
    assert trained("bert", "hiwi") == 368_640
    assert trained("bert", "hiwi", rank=16) == 1_474_560
    assert stored("bert", "hiwi") == stored("bert", "hiwi", rank=16) == 46_080
    assert stored("bert-large", "hiwi") == 122_880


@pytest.mark.parametrize("rank", [2, 5])
def test_what_is_stored_are_the_new_biases(rank):
    tuned = attach(tiny("bert"), "hiwi", rank=rank)
    stir(tuned)
    held = {n: t for n, t in stored_tensors(tuned.tuning()).items() if not n.startswith("head/")}
    assert sum(t.numel() for t in held.values()) == 3 * (48 + 80)
    assert {n.rpartition(".")[2] for n in held} == {"value"}


@pytest.mark.acid("hiwi", 1)
def test_merged_the_model_has_the_modules_of_the_base_and_computes_the_same():
    tuned = attach(tiny("bert", "classification"), "hiwi")
    train(tuned, 3)
    tuned.finish()
    expected = logits(tuned.model)
    merged = tuned.merge()
    torch.testing.assert_close(logits(merged), expected, atol=1e-6, rtol=1e-5)
    assert [type(m) for m in merged.modules()] == [type(m) for m in tiny("bert", "classification").modules()]


@pytest.mark.acid("hiwi", 3)
def test_a_bias_of_zeros_is_told_of_and_stays():
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.bias.zero_()
    with pytest.warns(UserWarning, match="1 of 6 tensors are zero, bert.encoder.layer.1.output.dense.bias"):
        tuned = attach(model, "hiwi")
    stir(tuned)
    module = tuned.modules(Hidden)["tensor/bert.encoder.layer.1.output.dense.bias"]
    assert not module(tuned.tensor("bert.encoder.layer.1.output.dense.bias")).any()


def test_where_all_are_zero_it_is_refused_unless_the_network_has_biases():
    model = tiny("bert")
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.output.dense.bias.zero_()
            layer.intermediate.dense.bias.zero_()
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match="adapter_bias=true"):
        attach(model, "hiwi")
    assert list(model.state_dict()) == before
    tuned = attach(model, "hiwi", adapter_bias=True)
    tuned.model(**inputs(tuned.model)).loss.backward()
    assert all(m.up.bias.grad.any() for m in tuned.modules(Hidden).values())


@pytest.mark.acid("hiwi", 4)
@pytest.mark.parametrize("name", ["bert", "gpt2"])  # a weight as (out, in), and one stored transposed
def test_of_a_weight_the_change_is_thin_and_a_function_of_each_row(name):
    tuned = attach(tiny(name), "hiwi", of="weight", rank=3, sites=("ffn.up",))
    stir(tuned)
    key, module = next(iter(tuned.modules(Hidden).items()))
    frozen = tuned.tensor(key.removeprefix("tensor/")).detach()
    change = (module(frozen) - frozen).detach()
    assert torch.linalg.matrix_rank(change, tol=1e-4) <= 3
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    rows = 1 if name == "gpt2" else 0
    moved = module(frozen.index_select(rows, order)) - frozen.index_select(rows, order)
    torch.testing.assert_close(moved.detach(), change.index_select(rows, order), atol=1e-6, rtol=1e-5)


def test_a_layer_without_a_bias_and_a_part_of_a_fused_one_are_refused():
    with pytest.raises(AnatomyError, match=r"has no bias\. Set of=weight"):
        attach(tiny("t5"), "hiwi", sites=("ffn.up",))
    with pytest.raises(AnatomyError, match="has no bias of its own"):
        attach(tiny("gpt2"), "hiwi", sites=("attn.q",))

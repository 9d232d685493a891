"""LoRA: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, frozen_copy, logits, same, stir, train
from tiny import inputs, tiny

from luthier import kernels
from luthier.core import AnatomyError, ConfigError
from luthier.surgery import attach

ALL = "attn,ffn"


@pytest.mark.acid("lora", 1)
def test_at_the_first_step_a_has_no_gradient_and_b_has_one():
    tuned = attach(tiny("bert"), "lora")
    tuned.model(**inputs(tuned.model)).loss.backward()
    for name, parameter in tuned.trained().items():
        if name.endswith(".a"):
            assert torch.count_nonzero(parameter.grad) == 0
        if name.endswith(".b"):
            assert torch.count_nonzero(parameter.grad) > 0


@pytest.mark.acid("lora", 2, 3)
def test_the_update_has_the_rank_and_doubles_with_alpha():
    one, two = (attach(tiny("llama"), "lora", rank=3, alpha=a, sites=("ffn.up",)) for a in (6.0, 12.0))
    train(one, 4)
    for key, module in one.modules().items():
        other = two.modules()[key]
        other.load_state_dict(module.state_dict())
        zero = torch.zeros(module.b.shape[0], module.a.shape[1])
        update, doubled = module.merged(zero, None)[0], other.merged(zero, None)[0]
        assert torch.linalg.matrix_rank(update) == 3
        assert torch.equal(doubled, 2 * update)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_fused_plain_and_written_out_agree_in_float64(name):
    sites = ("attn.o", "ffn.down", "ffn.up", "attn.q")
    results = []
    for plain in (False, True):
        tuned = attach_double(name, "lora", sites=sites, dropout=0.25)
        model = tuned.model
        stir(tuned, 0.1)
        batch = inputs(model)
        model.luthier.train()
        torch.manual_seed(3)
        with kernels.plain(plain):
            out = model(**batch)
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


def test_dropout_changes_the_branch_only():
    model = tiny("bert")
    tuned = attach(model, "lora", dropout=0.5)
    model.luthier.train()  # the trunk stays in evaluation mode
    batch = inputs(model)
    assert torch.equal(model(**batch).logits, model(**batch).logits), "B is zero: nothing of the branch may be seen"
    stir(tuned)
    torch.manual_seed(0)
    first, second = model(**batch).logits, model(**batch).logits
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, model(**batch).logits)


def test_a_bias_that_another_method_trains_keeps_its_gradient():
    grads = []
    for plain in (False, True):
        tuned = attach_double("bert", "lora+bitfit")
        stir(tuned, 0.1)
        with kernels.plain(plain):
            tuned.model(**inputs(tuned.model)).loss.backward()
        grads.append({n: p.grad for n, p in tuned.trained().items()})
    assert any("query.bias" in n for n in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-9, atol=1e-12)


@pytest.mark.acid("lora", 4)
def test_folding_a_hundred_times_leaves_the_weights_bit_for_bit():
    model = tiny("gpt2")
    tuned = attach(model, "lora", sites=ALL.split(","))
    stir(tuned, 0.1)
    before, tuned_logits = frozen_copy(tuned), logits(model)
    for _ in range(100):
        tuned.merging.fold()
        tuned.merging.unfold()
    assert same(dict(model.named_parameters()), before)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), tuned_logits, rtol=1e-5, atol=1e-5)


def test_frozen_weights_stay_and_the_loss_falls():
    tuned = attach(tiny("bert"), "lora")
    before = frozen_copy(tuned)
    losses = train(tuned, 30, lr=3e-2)
    assert losses[-1] < losses[0]
    assert same(dict(tuned.model.named_parameters()), before)


def test_a_place_without_a_weight_is_refused():
    with pytest.raises(AnatomyError, match="ffn_out@0 is no projection"):
        attach(tiny("bert"), "lora", sites=("ffn_out",))


def test_dropout_at_experts_is_refused():
    with pytest.raises(ConfigError, match="no meaning at experts"):
        attach(tiny("mixtral"), "lora", sites=("experts.down",), dropout=0.1)

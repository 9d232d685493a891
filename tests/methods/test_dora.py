"""DoRA: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, logits, stir
from tiny import inputs, tiny
from torch import nn

from luthier import kernels
from luthier.anatomy import Site
from luthier.core import AnatomyError
from luthier.surgery import METHODS, Base, attach


def _layer(d_in=7, d_out=5, bias=True):
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out, bias=bias).double()
    layer.requires_grad_(False)
    base = Base(layer, Site("attn.q", 0, "x", d_in, d_out, bias="bias" if bias else None))
    turn = METHODS.get("dora")(rank=3).build(base.site, base).double()
    return layer, base, turn


@pytest.mark.acid("dora", 1)
def test_at_the_start_m_is_the_row_norm_and_the_model_is_the_base():
    layer, _, turn = _layer()
    torch.testing.assert_close(turn.magnitude, layer.weight.norm(dim=1))
    model = tiny("llama")
    before = logits(model)
    attach(model, "dora", sites=("attn", "ffn"))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.acid("dora", 2)
@pytest.mark.parametrize("fused", [True, False])
def test_scaling_m_scales_the_output_without_its_bias(fused):
    layer, base, turn = _layer()
    x = torch.randn(4, 7, dtype=torch.float64)
    call = (lambda: turn.fused(base, x)) if fused else (lambda: turn.after(x, layer(x)))
    once = call() - layer.bias
    with torch.no_grad():
        turn.magnitude.mul_(2.5)
    torch.testing.assert_close(call() - layer.bias, 2.5 * once)


@pytest.mark.acid("dora", 3)
@pytest.mark.parametrize("fused", [True, False])
def test_gradients_are_those_of_a_norm_held_constant(fused):
    layer, base, turn = _layer()
    with torch.no_grad():
        turn.b.normal_()
    x = torch.randn(4, 7, dtype=torch.float64)
    target = torch.randn(4, 5, dtype=torch.float64)

    def reference(detached):
        whole = layer.weight + turn.scale * turn.b @ turn.a
        norm = whole.norm(dim=1)
        norm = norm.detach() if detached else norm
        return x @ (turn.magnitude[:, None] * whole / norm[:, None]).T + layer.bias

    def grads(out):
        return torch.autograd.grad(((out - target) ** 2).sum(), [turn.a, turn.b, turn.magnitude])

    ours = grads(turn.fused(base, x) if fused else turn.after(x, layer(x)))
    moving = grads(reference(False))
    for mine, held in zip(ours, grads(reference(True)), strict=True):
        torch.testing.assert_close(mine, held)
    assert not torch.allclose(ours[0], moving[0])
    assert torch.allclose(ours[2], moving[2]), "only A and B feel the norm"


@pytest.mark.acid("dora", 4)
def test_rows_of_the_merged_weight_have_exactly_the_lengths_m():
    layer, _, turn = _layer()
    with torch.no_grad():
        turn.b.normal_()
        turn.magnitude.uniform_(0.5, 2)
    merged, bias = turn.merged(layer.weight, layer.bias)
    torch.testing.assert_close(merged.norm(dim=1), turn.magnitude.detach())
    assert bias is layer.bias


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_fused_plain_and_merged_agree_in_float64(name):
    results = []
    for plain in (False, True):
        tuned = attach_double(name, "dora", sites=("attn", "ffn"), dropout=0.25)
        model = tuned.model
        stir(tuned, 0.05)
        batch = inputs(model)
        model.luthier.train()
        torch.manual_seed(3)
        with kernels.plain(plain):
            out = model(**batch)
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-11)
    before = logits(model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)  # merging computes in fp32
    tuned.merging.unfold()
    assert torch.equal(logits(model), before)


def test_the_cached_norm_is_not_stored():
    tuned = attach(tiny("bert"), "dora")
    assert all(set(m.stored()) == {"a", "b", "magnitude"} for m in tuned.modules().values())


def test_a_row_of_zeros_is_refused():
    model = tiny("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.value.weight[3] = 0
    with pytest.raises(AnatomyError, match=r"1 of the 48 rows of attn\.v@1 are zero"):
        attach(model, "dora")


def test_a_bias_trained_beside_it_gets_its_own_gradient():
    grads = []
    for method in ("dora+bitfit", "bitfit"):
        tuned = attach_double("bert", method)
        tuned.model(**inputs(tuned.model)).loss.backward()
        grads.append({n.split("model/")[-1]: p.grad for n, p in tuned.trained().items()})
    name = "bert.encoder.layer.1.attention.self.value.bias"
    torch.testing.assert_close(grads[0][name], grads[1][name])

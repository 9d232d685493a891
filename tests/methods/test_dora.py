"""DoRA: its own tests, beside those that every method passes."""

import json

import peft
import pytest
import torch
from methods.checks import attach_double, logits, stir
from tiny import inputs, tiny
from torch import nn

from luthier import kernels
from luthier.anatomy import Site
from luthier.core import AnatomyError, ConfigError
from luthier.surgery import METHODS, Base, attach, from_peft, method, to_peft

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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


AXES = [
    {"scaling": "root", "rank": 5},
    {"start": "svd"},
    {"start": "qr", "scaling": "root", "b_rate": 4.0},
    {"start": "mica", "train_b": False},
    {"start": "orthogonal", "rank": 4},
    {"start": "minor", "train_a": False, "rank": "3, attn.q@0: 5"},
]


@pytest.mark.parametrize("axes", AXES, ids=str)
def test_with_loras_axes_it_starts_at_the_base_and_fused_plain_and_merged_agree(axes):
    results = []
    for plain in (False, True):
        before, base = torch.get_default_dtype(), tiny("gpt2").double()
        torch.set_default_dtype(torch.float64)
        try:
            tuned = attach(base, method("dora", {"rank": 3, "sites": ["attn.q", "ffn.up"], **axes}))
        finally:
            torch.set_default_dtype(before)
        torch.testing.assert_close(logits(tuned.model), logits(tiny("gpt2").double()), rtol=0, atol=1e-9)
        assert tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
        stir(tuned, 0.05)
        with kernels.plain(plain):
            out = tuned.model(**inputs(tuned.model))
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-8, atol=1e-11)
    apart = logits(tuned.model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(tuned.model), apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("axes", [a for a in AXES if a.get("start") != "mica"], ids=str)
def test_with_loras_axes_its_files_go_to_peft_and_back(axes, tmp_path):
    tuned = attach(tiny("llama"), method("dora", {"rank": 3, "alpha": 7.0, **axes}))
    stir(tuned, 0.05)
    to_peft(tuned, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert said["use_dora"] and said.get("use_rslora", False) == (axes.get("scaling") == "root")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), str(tmp_path / "out")).eval()
    batch = inputs(tuned.model)
    torch.testing.assert_close(logits(theirs, batch), logits(tuned.model, batch), rtol=1e-5, atol=1e-5)
    again = tiny("llama")
    back = from_peft(again, tmp_path / "out").tuning().method
    assert (back.name, back.scaling) == ("dora", axes.get("scaling", "rank"))
    torch.testing.assert_close(logits(again, batch), logits(tuned.model, batch), rtol=1e-5, atol=1e-5)


def test_dora_from_pissas_start_is_pefts_with_the_same_first_gradient():
    tuned = attach(
        tiny("llama"), "dora", start="svd", rank=3, alpha=7.0, sites=("attn.k", "ffn.down"), train_head=False
    )
    config = peft.LoraConfig(
        r=3, lora_alpha=7, target_modules=["k_proj", "down_proj"], init_lora_weights="pissa", use_dora=True
    )
    other, batch = peft.get_peft_model(tiny("llama"), config).eval(), inputs(tuned.model)
    ours, found = tuned.model.eval()(**batch), other(**batch)
    torch.testing.assert_close(ours.logits, found.logits, rtol=1e-5, atol=1e-5)
    ours.loss.backward()
    found.loss.backward()
    layers, paths = dict(other.base_model.model.named_modules()), {s.key: s.path for s in tuned.anatomy.all_sites}
    for key, mine in tuned.modules().items():
        layer = layers[paths[key]]
        torch.testing.assert_close(
            mine.magnitude.grad, layer.lora_magnitude_vector["default"].weight.grad, rtol=1e-3, atol=1e-5
        )
        theirs_b = layer.lora_B["default"].weight
        sign = torch.sign((mine.b.detach() * theirs_b.detach()).sum(0))  # singular vectors are found up to their sign
        torch.testing.assert_close(mine.b.grad, theirs_b.grad * sign, rtol=1e-3, atol=1e-5)


def test_b_learns_faster_where_it_is_told_to_and_a_start_from_rows_looks_at_them():
    tuned = attach(tiny("bert"), "dora", b_rate=16.0, start="eva", rank=3)
    (group,) = tuned.groups()
    assert group.lr_factor == 16 and all(name.endswith(".b") for name in group.names) and len(group.names) == 6
    tuned.model.luthier.train()
    with pytest.raises(ConfigError, match="takes A and B from rows"):
        tuned.model(**inputs(tuned.model))
    tuned.tuning().method.prepare(tuned, [lambda: tuned.model(**inputs(tuned.model)).loss] * 10)
    assert all(bool(m.a.any()) for m in tuned.modules().values())
    tuned.model.eval()
    torch.testing.assert_close(logits(tuned.model), logits(tiny("bert")), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"start": "svd", "train_a": False, "train_b": False}, r"dora\.train_b: false, and neither A nor B learns"),
        ({"train_b": False}, "B stays zero"),
        ({"start": "svd", "rank": 60}, r"dora\.rank: 60 is above the 48"),
        ({"start": "orthogonal", "rank": 3}, "3 is odd"),
        ({"scaling": "square"}, "square"),
        ({"b_rate": 0.0}, "b_rate"),
    ],
)
def test_axes_that_do_not_go_are_refused(axes, message):
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), "dora", **axes)


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
    for words in ("dora+bitfit", "bitfit"):
        tuned = attach_double("bert", words)
        tuned.model(**inputs(tuned.model)).loss.backward()
        grads.append({n.split("model/")[-1]: p.grad for n, p in tuned.trained().items()})
    name = "bert.encoder.layer.1.attention.self.value.bias"
    torch.testing.assert_close(grads[0][name], grads[1][name])

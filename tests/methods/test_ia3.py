"""(IA)³: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, logits, stir
from tiny import HIDDEN, INNER, LAYERS, inputs, tiny

from luthier import kernels
from luthier.core import AnatomyError, ConfigError
from luthier.runs.spec import OptimSpec
from luthier.surgery import attach
from luthier.training.optimiser import optimiser_of


@pytest.mark.acid("ia3", 2)
def test_the_count_leaves_the_attention_output_alone():
    assert attach(tiny("bert"), "ia3").n_trained() == LAYERS * (2 * HIDDEN + INNER)


@pytest.mark.acid("ia3", 1)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "bart"])
def test_fused_plain_and_merged_agree_in_float64(name):
    results = []
    for plain in (False, True):
        tuned = attach_double(name, "ia3")
        model = tuned.model
        stir(tuned, 0.2)
        with kernels.plain(plain):
            out = model(**inputs(model))
            out.loss.backward()
        results.append([out.logits, *(p.grad for p in tuned.trained().values())])
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    before = logits(model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)  # merging computes in fp32


@pytest.mark.acid("ia3", 3)
def test_a_zero_vector_leaves_the_down_bias_alone():
    model = tiny("bert")
    tuned = attach(model, "ia3")
    with torch.no_grad():
        for key, module in tuned.modules().items():
            if key.startswith("ffn.down"):
                module.scale.zero_()
    layer = model.bert.encoder.layer[0]
    out = layer.output.dense(torch.randn(2, 3, INNER))
    assert torch.equal(out, layer.output.dense.bias.expand_as(out))


@pytest.mark.acid("ia3", 5)
def test_what_ffn_down_reads_is_scaled_and_not_what_ffn_up_gives():
    model, reference = tiny("bert"), tiny("bert")
    tuned = attach(model, "ia3", outputs=())
    stir(tuned)
    for layer, module in enumerate(m for k, m in tuned.modules().items() if k.startswith("ffn.down")):
        dense = reference.bert.encoder.layer[layer].output.dense
        dense.register_forward_pre_hook(lambda _, args, scale=module.scale: (args[0] * scale,))
    with torch.no_grad():
        for name, parameter in tuned.trained().items():
            if name.startswith("head/"):
                dict(reference.named_parameters())[name.removeprefix("head/")].copy_(parameter)
    torch.testing.assert_close(logits(model), logits(reference))


@pytest.mark.acid("ia3", 4)
def test_decay_pulls_towards_one():
    tuned = attach(tiny("bert"), "ia3")
    (group,) = tuned.groups()
    assert group.decay_to == 1.0
    assert set(group.names) == {n for n in tuned.trained() if not n.startswith("head/")}
    assert len(group.names) == 3 * LAYERS
    stir(tuned)
    named = tuned.trained()
    before = {n: p.detach().clone() for n, p in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser_of(OptimSpec(weight_decay=0.5), named, tuned.groups(), 0.1).step(1.0)
    for name in group.names:
        torch.testing.assert_close(named[name] - 1, 0.95 * (before[name] - 1))


def test_groups_name_the_tensors_where_there_are_several_tunings():
    tuned = attach(tiny("bert"), "ia3", name="one", train_head=False)
    tuned.add("lora", name="two", train_head=False)
    names = {n for g in tuned.groups() for n in g.names}
    assert names <= set(tuned.trained())
    assert len(names) == 3 * LAYERS


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"outputs": (), "inputs": ()}, ConfigError, "name no place"),
        ({"outputs": ("norm",)}, AnatomyError, r"ia3\.outputs: norm@0\.0 is no projection"),
        ({"outputs": ("embed",)}, AnatomyError, r"ia3\.outputs: embed is no projection"),
        ({"inputs": ("embed",)}, AnatomyError, r"ia3\.inputs: embed is no projection"),
    ],
)
def test_places_that_it_cannot_rescale_are_refused_before_anything_trains(settings, error, words):
    with pytest.raises(error, match=words):
        attach(tiny("bert"), "ia3", **settings)

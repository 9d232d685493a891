"""Methods merged together: the same function as attached together, or a refusal before anything is changed."""

import pytest
import torch
from cells import small
from kinds import prepared
from methods.checks import logits, stir
from tiny import inputs, tiny

from luthier import kernels
from luthier.core import AnatomyError, CompositionError
from luthier.surgery import METHODS, Combined, attach


@pytest.mark.parametrize(
    "words", ["lora+ia3", "dora+ia3", "bitfit+dora", "child_tuning_d+lora", "intrinsic_said+lora", "diff_pruning+lora"]
)
def test_they_merge_to_what_they_compute(words):
    model = tiny("bert")
    tuned = attach(model, words)
    stir(tuned, 0.05)
    before = logits(model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


PARTNERS = [n for n in METHODS.names() if n != "dora" and small(n).mergeable]


@pytest.mark.parametrize("other", PARTNERS)
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_dora_merges_to_what_it_computes_beside_every_method_that_merges(name, other):
    model = tiny(name)
    try:
        tuned = attach(model, Combined(members=(small("dora"), *small(other).parts())))
    except (AnatomyError, CompositionError):
        return
    prepared(tuned, inputs(model))
    stir(tuned, 0.3)
    before = logits(model)
    with kernels.plain():
        torch.testing.assert_close(logits(model), before, rtol=2e-5, atol=2e-5)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("order", [("dora", "child_tuning_d"), ("child_tuning_d", "dora")])
def test_dora_measures_a_weight_that_another_tuning_trains_as_it_is(order):
    model = tiny("bert")
    for word in order:
        tuned = attach(model, small(word), name=word, train_head=False)
        prepared(tuned, inputs(model))
        stir(tuned, 0.3)
    for active in (order, ("dora",), order):
        tuned.activate(*active)
        before = logits(model)
        tuned.merging.fold()
        torch.testing.assert_close(logits(model), before, rtol=2e-5, atol=2e-5)
        tuned.merging.unfold()
    tuned.remove("child_tuning_d")
    before = logits(model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("words", ["intrinsic_said+dora", "dora+diff_pruning"])
def test_dora_does_not_measure_what_another_computes_anew(words):
    with pytest.raises(CompositionError, match="computes anew"):
        attach(tiny("bert"), words)

"""Methods merged together: the same function as attached together, or a refusal before anything is changed."""

import pytest
import torch
from methods.checks import logits, stir
from tiny import tiny

from luthier.core import CannotMerge
from luthier.surgery import attach


@pytest.mark.parametrize("words", ["lora+ia3", "dora+ia3", "bitfit+dora", "child_tuning_d+lora"])
def test_they_merge_to_what_they_compute(words):
    model = tiny("bert")
    tuned = attach(model, words)
    stir(tuned, 0.05)
    before = logits(model)
    tuned.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", ["intrinsic_said+lora", "diff_pruning+dora"])
def test_a_weight_computed_anew_with_something_attached_to_it_is_not_merged(words):
    model = tiny("bert")
    tuned = attach(model, words)
    stir(tuned, 0.05)
    before = logits(model)
    with pytest.raises(CannotMerge, match="computes this weight anew"):
        tuned.merge()
    assert torch.equal(logits(model), before)

"""Methods merged together: the same function as attached together, or a refusal before anything is changed."""

import pytest
import torch
from methods.checks import logits, stir
from tiny import tiny

from luthier.core import CompositionError
from luthier.surgery import attach


@pytest.mark.parametrize(
    "words", ["lora+ia3", "dora+ia3", "bitfit+dora", "child_tuning_d+lora", "intrinsic_said+lora", "diff_pruning+lora"]
)
def test_they_merge_to_what_they_compute(words):
    model = tiny("bert")
    tuned = attach(model, words)
    stir(tuned, 0.05)
    before = logits(model)
    tuned.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("words", ["intrinsic_said+dora", "dora+diff_pruning"])
def test_dora_does_not_measure_what_another_computes_anew(words):
    with pytest.raises(CompositionError, match="computes anew"):
        attach(tiny("bert"), words)

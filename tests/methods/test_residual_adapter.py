"""Residual adapter: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, counted, logits, read_by, stir, train
from tiny import tiny

from luthier.core import AnatomyError
from luthier.surgery import attach


@pytest.mark.acid("residual_adapter", 3)
@pytest.mark.parametrize(("width", "numbers"), [(100, 1_872_048), (300, 5_560_848)])
def test_its_numbers_on_bert_base_are_those_of_the_paper(width, numbers):
    assert counted("residual_adapter", width=width) == numbers


@pytest.mark.acid("residual_adapter", 1)
def test_a_larger_and_shifted_stream_gives_the_same_branch():
    tuned = attach_double("gpt2", "residual_adapter", width=7)
    stir(tuned)
    module = tuned.modules()["block_out@1"]
    module.norm.eps = 1e-12
    y = torch.randn(2, 5, 48, dtype=torch.float64)
    moved = 3.7 * y + 0.8
    torch.testing.assert_close(module.after(None, moved) - moved, module.after(None, y) - y, rtol=1e-7, atol=1e-9)


def test_it_stands_on_the_stream_that_the_block_hands_on():
    tuned = attach_double("gpt2", "residual_adapter", width=7)
    stir(tuned)
    block, module = tuned.model.transformer.h[0], tuned.modules()["block_out@0"]
    u = read_by(block.ln_2, tuned.model)
    y = u + block.mlp(block.ln_2(u))
    hidden = torch.relu(module.norm(y) @ module.down.weight.T + module.down.bias)
    found = read_by(tuned.model.transformer.h[1].ln_1, tuned.model)
    wanted = (y + hidden @ module.up.weight.T + module.up.bias).detach()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_with_a_second_layer_of_zeros_it_starts_at_the_base():
    model = tiny("gpt2")
    base = logits(model)
    attach(model, "residual_adapter", width=7, init="zero_up")
    assert torch.equal(logits(model), base)


def test_a_place_inside_a_block_is_refused():
    with pytest.raises(AnatomyError, match=r"residual_adapter\.sites: attn_out@0 is not the end of a block"):
        attach(tiny("bert"), "residual_adapter", sites=["attn_out"])


@pytest.mark.acid("residual_adapter", 2)
def test_beside_a_prompt_of_one_vector_no_old_row_of_the_embedding_moves_under_decay():
    tuned = attach(tiny("gpt2"), "residual_adapter+prompt_tuning", width=7, length=1)
    table = tuned.model.transformer.wte.weight.detach().clone()
    prompt = next(p for n, p in tuned.trained().items() if n.startswith("prompt_tuning:prompt"))
    before = prompt.detach().clone()
    train(tuned, 3, decay=0.1)
    assert torch.equal(tuned.model.transformer.wte.weight, table)
    assert not torch.equal(prompt, before)

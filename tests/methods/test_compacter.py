"""Compacter and Compacter++: their own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir
from methods.sizes import trained
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.hybrid.compacter import Closing
from luthier.methods.parts.kronecker import Rule
from luthier.surgery import attach, load
from luthier.surgery.tuning_files import stored_tensors


def closed(name="bert", words="compacter", **settings):
    tuned = attach(tiny(name), words, **{"reduction": 4, **settings})
    return tuned, list(tuned.modules(Closing).values())


@pytest.mark.acid("compacter_pp", 1)
def test_counts_are_those_of_the_catalogue():
    assert trained("roberta", "compacter", norms=False) == 57_088
    assert trained("roberta", "compacter_pp", norms=False) == 28_576
    assert trained("roberta", "compacter") == 57_088 + 38_400
    assert trained("t5", "compacter") == 161_728


@pytest.mark.acid("compacter", 1)
def test_a_matrix_is_the_sum_of_kronecker_products():
    tuned, modules = closed(rank=2)
    stir(tuned)
    a = next(iter(tuned.modules(Rule).values())).a
    for module in modules:
        for found, s, t in zip(
            module.matrices(), (module.down_s, module.up_s), (module.down_t, module.up_t), strict=True
        ):
            wanted = sum(torch.kron(a[k], s[k] @ t[k]) for k in range(4))
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.acid("compacter", 2, 3)
def test_the_shared_matrices_are_one_tensor_in_training_in_the_file_and_after_loading(tmp_path):
    tuned, modules = closed()
    stir(tuned)
    assert len({m.__dict__["rule"].a.data_ptr() for m in modules}) == 1
    assert sum(n.endswith("rule.a") for n in tuned.trained()) == 1
    assert sum("rule" in n for n in stored_tensors(tuned.tuning())) == 1
    tuned.save(tmp_path / "tuning")
    model = tiny("bert")
    again = load(model, tmp_path / "tuning")
    assert torch.equal(logits(model), logits(tuned.model))
    assert len({id(m.__dict__["rule"]) for m in again.modules(Closing).values()}) == 1


@pytest.mark.acid("compacter", 4)
def test_with_one_summand_of_one_it_is_a_low_rank_adapter():
    tuned, modules = closed(n=1, rank=2)
    with torch.no_grad():
        next(iter(tuned.modules(Rule).values())).a.fill_(1.0)
    module, y = modules[0], torch.randn(3, 48)
    down, up = module.down_s[0] @ module.down_t[0], module.up_s[0] @ module.up_t[0]
    wanted = y + torch.nn.functional.gelu(y @ down.T + module.down_bias) @ up.T + module.up_bias
    torch.testing.assert_close(module.after(y, y), wanted, atol=1e-5, rtol=1e-5)
    assert torch.linalg.matrix_rank(down) == 2


@pytest.mark.acid("compacter", 5)
def test_twice_the_layers_add_adapters_and_no_shared_matrices():
    counts = [
        attach(tiny("bert", num_hidden_layers=n), "compacter", reduction=4, norms=False).n_trained() for n in (3, 6)
    ]
    assert counts[1] - counts[0] == 3 * 2 * 3 * (48 + 12)


@pytest.mark.acid("compacter", 6)
def test_its_rank_is_far_above_that_of_its_factors():
    tuned, modules = closed(n=4, reduction=2)
    stir(tuned)
    assert torch.linalg.matrix_rank(modules[0].matrices()[0].detach(), tol=1e-4) == 16


def test_with_a_second_matrix_of_zeros_it_starts_as_the_base():
    base = logits(tiny("bert"))
    assert torch.equal(logits(closed(zero_up=True)[0].model), base)
    apart = (logits(closed()[0].model) - base).abs().max()
    assert 0 < apart < 0.05 * base.abs().max()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"reduction": 32}, "Near it, 6, 12 will do|Near it, 4, 6, 12 will do"),
        ({"n": 5}, "Choose an n that divides 48"),
    ],
)
def test_widths_that_do_not_divide_are_refused_with_those_that_do(settings, says):
    with pytest.raises(ConfigError, match=says):
        closed(**settings)

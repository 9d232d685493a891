"""OFT and BOFT: their own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, logits, stir, train
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.parts.orthogonal import cayley, cayley_series, skew, turn_blocks, upper
from luthier.methods.reparameterised.orthogonal.boft import paired
from luthier.surgery import attach


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_blocks_turn_as_their_block_diagonal_matrix_does() -> None:
    x, r = drawn(2, 3, 12), drawn(3, 4, 4, seed=1)
    torch.testing.assert_close(turn_blocks(x, r), x @ torch.block_diag(*r))
    numbers = drawn(3, 6)
    assert torch.equal(upper(skew(numbers, 4)), numbers)


@pytest.mark.acid("oft", 1, 2, 3)
@pytest.mark.parametrize(("method", "settings"), [("oft", {"block": 8}), ("boft", {"block": 4, "factors": 3})])
def test_after_training_the_input_is_turned_and_the_weight_keeps_its_lengths_and_angles(method, settings) -> None:
    tuned = attach_double("llama", method, sites=("attn.q", "ffn.up"), **settings)
    train(tuned, 4, lr=0.1)
    for key, module in tuned.modules().items():
        site = next(s for s in tuned.anatomy.all_sites if s.key == key)
        if method == "boft":
            with torch.no_grad():
                module.s.fill_(1.0)  # what it gives is scaled too; the turning is looked at
        r = module.before(torch.eye(site.d_in, dtype=torch.float64))
        one = torch.eye(site.d_in, dtype=torch.float64)
        torch.testing.assert_close(r @ r.T, one, rtol=0, atol=1e-10)
        assert not torch.allclose(r, one, atol=1e-3)
        weight = tuned.model.get_submodule(site.path).base.weight.detach()
        turned = module.merged(weight, None)[0]
        torch.testing.assert_close(torch.linalg.svdvals(turned), torch.linalg.svdvals(weight))
        torch.testing.assert_close(turned @ turned.T, weight @ weight.T)


def test_a_cut_series_is_no_rotation_and_the_solved_one_is() -> None:
    """Measured: |R^T R - I| of peft's five terms at entries of 0.01, 0.05 and 0.1, and ours."""
    found = []
    for size in (0.01, 0.05, 0.1):
        q = skew(size * drawn(1, 32 * 31 // 2), 32)
        gaps = [torch.linalg.matrix_norm((r.transpose(1, 2) @ r)[0] - torch.eye(32).double()) for r in
                (cayley_series(q, 5), cayley(q))]  # fmt: skip
        found.append(float(gaps[0]))
        assert gaps[1] < 1e-12
    assert 1e-5 < found[0] < 1e-2 < found[1] < 1.5 < found[2]
    q = skew(0.001 * drawn(1, 6), 4)
    torch.testing.assert_close(cayley_series(q, 5), cayley(-q), rtol=0, atol=1e-9)
    assert not torch.allclose(cayley_series(q, 5), cayley(q), rtol=0, atol=1e-4)


@pytest.mark.acid("boft", 1)
def test_boft_with_one_factor_is_oft() -> None:
    found = []
    for method, settings in (("oft", {"block": 8}), ("boft", {"block": 8, "factors": 1})):
        tuned = attach(tiny("llama"), method, sites=("ffn.down",), train_head=False, **settings)
        for key, module in tuned.modules().items():
            numbers = 0.2 * drawn(80 // 8, 28, seed=len(key)).float()
            with torch.no_grad():
                if method == "oft":
                    module.q.copy_(numbers)
                else:
                    module.a[0].copy_(skew(numbers, 8))  # its skew part is itself
        found.append(logits(tuned.model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_a_factor_gathers_the_even_halves_of_its_blocks() -> None:
    assert paired(8, 4, 0).tolist() == list(range(8))
    assert paired(16, 4, 1).tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    from peft.tuners.boft.layer import BOFTLayer

    for i in range(3):
        theirs = BOFTLayer.block_butterfly_perm(None, 48, 12 // 2**i, 2, 2)
        assert torch.equal(paired(48, 4, i), theirs)


def test_boft_is_the_product_of_its_factors_written_out() -> None:
    tuned = attach_double("bert", "boft", block=4, factors=3, sites=("attn.o",))
    stir(tuned, 0.2)
    module = next(iter(tuned.modules().values()))
    whole = torch.eye(48, dtype=torch.float64)
    for i, blocks in enumerate(module.rotations()):
        p = torch.eye(48, dtype=torch.float64)[paired(48, 4, i)]
        whole = p @ torch.block_diag(*blocks) @ p.T @ whole
    x = drawn(5, 48, seed=3)
    torch.testing.assert_close(module.before(x), x @ whole)
    assert torch.count_nonzero(whole.abs() > 1e-9) > 48 * 8, "the factors mix what no single one does"


def test_with_a_constraint_the_change_stays_below_it_and_is_peft_s_projection() -> None:
    from peft.tuners.oft.layer import OFTRotationModule

    tuned = attach(tiny("bert"), "oft", block=8, constraint=0.05)
    train(tuned, 3, lr=0.1)
    for module in tuned.modules().values():
        assert torch.linalg.matrix_norm(skew(module.q, 8)).max() <= 0.05 / len(module.q) ** 0.5 + 1e-7
        numbers = drawn(6, 28).float()
        theirs = OFTRotationModule(6, 28, 8, 48, coft=True)._project_batch(numbers, eps=0.05)
        module.q.data.copy_(numbers)
        module.bound(0.05)
        torch.testing.assert_close(module.q.data, theirs)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("oft", {}, r"oft.block: 32 does not divide the 48 of attn.q@0 \(d_in\). Near it, .*16, 24, 48 do"),
        ("boft", {"block": 8, "factors": 3}, r"boft.block \* 2\^\(factors - 1\): 32 does not divide the 48"),
        ("boft", {"block": 3}, "boft.block: 3 is odd"),
    ],
)
def test_blocks_that_do_not_divide_are_refused(method, settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), method, **settings)

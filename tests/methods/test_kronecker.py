"""KronA, its branches, LoKr, PHM delta and KAdaptation: their own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import attach_double, logits, stir, train
from tiny import inputs, tiny

from luthier import kernels
from luthier.core import ConfigError
from luthier.methods.parts.kronecker import KroneckerUpdate, Rule, kron_linear, near_square, phm_thin, phm_weight
from luthier.methods.parts.low_rank import Thin
from luthier.surgery import METHODS, attach


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- krona


@pytest.mark.acid("krona", 1)
@pytest.mark.acid("krona_b", 1)
@pytest.mark.acid("lokr", 1)
@pytest.mark.parametrize("shapes", [((3, 4), (5, 2)), ((2, 7), (3, 3)), ((6, 1), (1, 5)), ((1, 8), (9, 2))])
def test_two_small_products_equal_the_kronecker_product_written_out(shapes) -> None:
    a, b = drawn(*shapes[0]), drawn(*shapes[1], seed=1)
    x = drawn(2, 3, a.shape[1] * b.shape[1], seed=2)
    torch.testing.assert_close(kron_linear(x, a, b), x @ torch.kron(a, b).T, rtol=1e-12, atol=1e-12)


def test_factors_are_the_nearest_to_the_root() -> None:
    assert [near_square(n) for n in (768, 11008, 48, 49, 13, 1)] == [
        (24, 32), (86, 128), (6, 8), (7, 7), (1, 13), (1, 1),
    ]  # fmt: skip


@pytest.mark.acid("krona", 2)
def test_the_rank_of_the_update_is_the_product_of_the_ranks() -> None:
    tuned = attach(tiny("llama"), "krona", sites=("ffn.up",), rows=4, columns=3)
    module = next(iter(tuned.modules(KroneckerUpdate).values()))
    with torch.no_grad():
        module.a.copy_(drawn(4, 3))  # rank 3
        module.b.copy_(drawn(20, 4, seed=1) @ drawn(4, 16, seed=2))  # rank 4
    update = module.merged(torch.zeros(80, 48), None)[0]
    assert torch.linalg.matrix_rank(update) == 12


@pytest.mark.acid("krona", 3)
def test_nothing_as_large_as_the_weight_is_made_in_a_pass_or_its_gradient() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple | list) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    a, b = torch.randn(24, 32, requires_grad=True), torch.randn(32, 24, requires_grad=True)
    x = torch.randn(3, 768, requires_grad=True)
    with Watch():
        kron_linear(x, a, b).sum().backward()
    assert 0 < largest <= 3 * 32 * 32


@pytest.mark.acid("krona_b_res", 1)
def test_the_residual_branch_without_its_product_is_the_layer_plus_a_share_of_its_input() -> None:
    tuned = attach(tiny("bert"), "krona_b_res")
    layer = tuned.anatomy.sites("ffn_out")[0]
    module = next(iter(tuned.modules().values()))
    x, y = torch.randn(2, 48), torch.randn(2, 48)
    assert torch.equal(module.after(x, y), y)
    with torch.no_grad():
        module.residual.fill_(0.25)
    assert torch.equal(module.after(x, y), y + 0.25 * x)
    assert layer.d_out == 48
    assert not METHODS.get("krona_b_res")(residual_start=1.0).starts_at_base
    with pytest.raises(ConfigError, match=r"krona_b.rows: 5 does not divide the 48 of ffn_out@0"):
        attach(tiny("bert"), "krona_b", rows=5)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("krona", {"rows": 7}, r"krona.rows: 7 does not divide the 48 of attn.q@0 \(d_out\). Near it, 3, 4, 6, 8 do"),
        ("lokr", {"factor": 5}, r"lokr.factor: 5 does not divide the 48 and 48 of attn.q@0"),
        ("phm_delta", {"n": 5}, r"phm_delta.n: 5 does not divide"),
        ("kadaptation", {}, r"kadaptation.n: 32 does not divide the 48 and 48 .* 12, 16, 24, 48 do"),
    ],
)
def test_a_size_that_does_not_divide_is_refused_and_those_near_it_are_named(method, settings, message) -> None:
    model = tiny("bert")
    before = list(model.state_dict())
    with pytest.raises(ConfigError, match=message):
        attach(model, method, **settings)
    assert list(model.state_dict()) == before


# --- lokr


@pytest.mark.parametrize("settings", [{}, {"both": True, "rank": 1, "factor": 4}, {"rank": 40}])
def test_what_a_factor_is_follows_from_the_rank_and_all_parts_learn(settings) -> None:
    tuned = attach(tiny("llama"), "lokr", sites=("ffn.down", "attn.k"), **settings)
    for module in tuned.modules().values():
        held = {name for name, _ in module.named_parameters()}
        c, d = module.factors()
        rank = settings.get("rank", 8)
        assert ("c" in held) == (not (settings.get("both", False) and rank < max(c.shape) / 2))
        assert ("d" in held) == (rank >= max(d.shape) / 2)
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    train(tuned, 3)
    assert all(not torch.equal(p, start[n]) for n, p in tuned.trained().items() if not n.startswith("head/"))


# --- phm_delta, kadaptation


@pytest.mark.parametrize("rank_one", [False, True])
def test_the_thin_form_is_the_sum_of_kronecker_products(rank_one) -> None:
    rule = Rule(3, rank_one=rank_one).double()
    s, t = drawn(3, 5, 2), drawn(3, 2, 4, seed=1)
    wanted = sum(torch.kron(m.contiguous(), s[k] @ t[k]) for k, m in enumerate(rule.whole()))
    a, b = phm_thin(rule, s, t)
    assert len(a) == (3 * 2 if rank_one else 3 * 3 * 2)
    torch.testing.assert_close(b @ a, wanted)
    torch.testing.assert_close(phm_weight(rule, s, t), wanted)


@pytest.mark.acid("kadaptation", 2)
@pytest.mark.parametrize("name", ["phm_delta", "kadaptation"])
def test_the_rule_exists_once_and_every_place_sends_it_a_gradient(name) -> None:
    results = []
    for plain in (False, True):
        tuned = attach_double("gpt2", name, n=4, sites=("attn.q", "ffn.up"), dropout=0.25)
        assert len([n for n in tuned.trained() if n.startswith("rule.")]) == (2 if name == "kadaptation" else 1)
        stir(tuned, 0.1)
        tuned.model.luthier.train()
        torch.manual_seed(3)
        with kernels.plain(plain):
            tuned.model(**inputs(tuned.model)).loss.backward()
        results.append({n: p.grad for n, p in tuned.trained().items()})
    for full, gradient in results[0].items():
        assert bool(gradient.any())
        torch.testing.assert_close(gradient, results[1][full], rtol=1e-9, atol=1e-12)


@pytest.mark.acid("kadaptation", 1)
def test_both_own_factors_at_zero_never_move_and_ours_do() -> None:
    tuned = attach(tiny("bert"), "kadaptation", n=4)
    modules = list(tuned.modules(Thin).values())
    with torch.no_grad():
        for module in modules:
            module.s.zero_()
    train(tuned, 3)
    assert not any(bool(m.s.any() or m.t.any()) for m in modules), "the start of the authors' code"
    tuned = attach(tiny("bert"), "kadaptation", n=4)
    start = {n: p.detach().clone() for n, p in tuned.trained().items()}
    train(tuned, 3)
    assert all(not torch.equal(p, start[n]) for n, p in tuned.trained().items())


def test_in_rows_two_of_them_are_computed_in_one_product() -> None:
    tuned = attach(tiny("llama"), "phm_delta", seed=0)
    tuned.add(METHODS.get("phm_delta")(rank=2), name="other", seed=1)
    stir(tuned, 0.2)
    batch = inputs(tuned.model)
    tuned.activate("other")
    stir(tuned, 0.2)
    other = logits(tuned.model, batch)
    tuned.activate("default")
    own = logits(tuned.model, batch)
    with tuned.rows(["default", "other", "default"]):
        found = logits(tuned.model, batch)
    torch.testing.assert_close(found, torch.stack([own[0], other[1], own[2]]), rtol=1e-5, atol=1e-5)

"""MiSS, GraLoRA, DeLoRA, HiRA, RandLoRA, HRA, RoAd, C3A and WaveFT: their own tests, beside those that all pass."""

import pytest
import torch
from methods.checks import attach_double, stir, train
from tiny import tiny
from torch import nn

from luthier.core import ConfigError
from luthier.methods.parts.low_rank import Thin
from luthier.methods.reparameterised.spectral.waveft import inverse_haar
from luthier.surgery import attach


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def only(method: str, site: str = "ffn.up", **settings):
    """The first attachment of a tuning in float64, its numbers nowhere zero."""
    tuned = attach_double("llama", method, sites=(site,), train_head=False, **settings)
    stir(tuned, 0.3)
    return tuned, next(m for k, m in tuned.modules().items() if "@" in k)


def test_miss_sums_the_shards_and_fills_up_the_last() -> None:
    _, module = only("miss", rank=7)
    x = drawn(3, 48)
    shards = nn.functional.pad(x, (0, 1)).view(3, 7, 7).sum(1)
    wanted = shards @ module.block
    torch.testing.assert_close(module.after(x, torch.zeros(3, 80).double()), wanted)


def test_gralora_is_a_grid_of_small_loras_of_a_higher_rank() -> None:
    _, module = only("gralora", rank=6, k=2, alpha=3.0)
    update = module.merged(torch.zeros(80, 48).double(), None)[0]
    for j in range(2):
        for i in range(2):
            block = update[40 * j : 40 * j + 40, 24 * i : 24 * i + 24]
            inner = module.b[j, 3 * i : 3 * i + 3].T @ module.a[i, :, 3 * j : 3 * j + 3].T
            torch.testing.assert_close(block, 0.5 * inner)
    assert torch.linalg.matrix_rank(update) == 12
    one, lora = only("gralora", rank=3, k=1, alpha=6.0)[1], only("lora", rank=3, alpha=6.0)[1]
    with torch.no_grad():
        lora.a.copy_(one.a[0].T)
        lora.b.copy_(one.b[0].T)
    for mine, theirs in zip(one.thin(), lora.thin(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_delora_s_update_has_the_size_of_its_strength_whatever_its_factors() -> None:
    _, module = only("delora", rank=1, strength=0.5)
    sizes = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            module.a.mul_(factor)
            module.strength.fill_(0.5)
        update = module.merged(torch.zeros(80, 48).double(), None)[0] / module.lengths
        sizes.append(float(torch.linalg.matrix_norm(update.detach())))
    assert sizes == pytest.approx([0.5, 0.5])


def test_hira_changes_no_entry_where_the_weight_is_zero_and_is_of_higher_rank() -> None:
    _, module = only("hira", rank=2)
    with torch.no_grad():
        module.base.module.weight[3].zero_()
    update = module.update()
    assert not update[3].any()
    assert torch.linalg.matrix_rank(update) > 4


@pytest.mark.parametrize("site", ["ffn.up", "ffn.down"])
def test_randlora_s_update_is_of_full_rank_from_one_pool(site: str) -> None:
    tuned, module = only("randlora", site, rank=7)
    update = module.update()
    assert tuple(update.shape) == ((80, 48) if site == "ffn.up" else (48, 80))
    assert torch.linalg.matrix_rank(update) == 48
    assert len({id(m.__dict__["pool"]) for k, m in tuned.modules().items() if "@" in k}) == 1


def test_hra_s_chain_is_the_product_of_its_reflections_and_starts_as_none() -> None:
    _, module = only("hra", rank=4)
    one = torch.eye(48).double()
    whole = one
    for k in range(4):
        u = module.u[:, k] / module.u[:, k].norm()
        whole = whole @ (one - 2 * torch.outer(u, u))
    x = drawn(3, 48)
    torch.testing.assert_close(module.before(x), x @ whole.T)
    torch.testing.assert_close(whole @ whole.T, one)
    fresh = next(iter(attach_double("llama", "hra", sites=("ffn.up",)).modules().values()))
    torch.testing.assert_close(fresh.before(x), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_merges_with_the_bias_and_road_1_turns_and_scales_pairs(variant: str) -> None:
    _, module = only("road", variant=variant, group=8)
    weight, bias, x = drawn(80, 48), drawn(80, seed=1), drawn(3, 48, seed=2)
    merged = module.merged(weight, bias)
    torch.testing.assert_close(module.after(x, x @ weight.T + bias), x @ merged[0].T + merged[1])
    if variant == "road_1":
        y = drawn(80, seed=3)
        out = module.turn(y)
        pairs, turned = (n.view(10, 2, 4) for n in (y, out))
        scale = module.alpha.view(10, 4).abs()
        torch.testing.assert_close(turned.square().sum(1).sqrt(), pairs.square().sum(1).sqrt() * scale)


def test_c3a_convolves_in_a_circle_and_its_gradient_is_right_where_peft_s_is_not() -> None:
    from peft.tuners.c3a.utils import BlockCircularConvolution, get_circulant_fast

    _, module = only("c3a", block=8)
    kernel, x = module.c.detach(), drawn(3, 48).requires_grad_()
    torch.testing.assert_close(module.update().detach(), get_circulant_fast(kernel) / 48)
    grad = drawn(3, 80, seed=1)
    theirs = BlockCircularConvolution.apply(x, kernel) / 48
    ours = x @ module.update().detach().T
    torch.testing.assert_close(theirs, ours)
    (mine,) = torch.autograd.grad(ours, x, grad)
    (other,) = torch.autograd.grad(theirs, x, grad)
    step = 1e-6 * drawn(3, 48, seed=2)
    change = float(((BlockCircularConvolution.apply(x + step, kernel) / 48 - theirs) * grad).sum().detach())
    assert float((mine * step).sum().detach()) == pytest.approx(change, rel=1e-4)
    assert float((other * step).sum().detach()) != pytest.approx(change, rel=1e-2), "peft has mended it: say so"


def test_waveft_s_transform_is_orthogonal_and_changes_four_entries_for_each_coefficient() -> None:
    f = drawn(10, 6)
    assert float(inverse_haar(f).norm()) == pytest.approx(float(f.norm()))
    one = torch.zeros(10, 6)
    one[2, 1] = 1.0  # an average: of rows 4 and 5, columns 2 and 3
    assert inverse_haar(one).nonzero().tolist() == [[4, 2], [4, 3], [5, 2], [5, 3]]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("miss", {"rank": 50}, "miss.rank: 50 is above the 48 inputs of attn.q@0"),
        ("gralora", {"rank": 7}, "gralora.rank: 7 is no multiple of k = 2; use 8"),
        ("gralora", {"rank": 10, "k": 5}, "gralora.k: 5 does not divide the 48 and 48"),
        ("hra", {"rank": 3}, "hra.rank: 3 is odd"),
        ("road", {}, "road.group: 64 does not divide the 48 of attn.q@0"),
        ("road", {"group": 3}, "road.group: 3 is odd"),
        ("c3a", {}, "c3a.block: 128 does not divide"),
        ("waveft", {"n": 5000}, "waveft.n: 5000 coefficients are more than the 2304"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(method: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        attach(tiny("bert"), method, **settings)


@pytest.mark.parametrize("method", ["miss", "gralora", "delora"])
def test_thin_ones_are_trained_by_the_fused_product(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = Thin.fused
    monkeypatch.setattr(Thin, "fused", lambda self, base, x: calls.append(1) or real(self, base, x))
    tuned = attach(tiny("bert"), method, rank=4)
    train(tuned, 1)
    assert len(calls) == 6

import pytest
import torch

from luthier.core import ConfigError
from luthier.kernels import dropout, keep_mask, plain
from luthier.kernels.dropout import _LEVELS, _levels


def test_the_rate_is_p_within_five_standard_errors():
    for p in (0.05, 0.1, 0.3, 0.5, 0.9):
        n = 1_000_003
        kept = keep_mask((n,), p, seed=7).double().mean().item()
        assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5 + 2**-16


def test_each_of_the_four_draws_of_a_counter_has_the_rate():
    kept = keep_mask((4_000_000,), 0.25, seed=3).view(-1, 4).double()
    assert ((kept.mean(0) - 0.75).abs() < 5 * (0.1875 / 1e6) ** 0.5).all()
    assert (torch.corrcoef(kept.T) - torch.eye(4)).abs().max() < 5e-3


def test_neighbouring_elements_rows_and_seeds_are_independent():
    n = 1_000_000
    masks = {s: keep_mask((n,), 0.5, seed=s).double() - 0.5 for s in (0, 1, 2, 2**40, 2**62, 2**62 + 1)}
    limit = 5 / n**0.5
    first = masks[0]
    for lag in (1, 2, 3, 4, 5, 8, 64, 384, 768, 4 * 2**15, 4 * 2**15 + 4):
        assert abs((first[lag:] * first[:-lag]).mean().item() * 4) < limit * 1.2, lag
    seeds = sorted(masks)
    for i, a in enumerate(seeds):
        for b in seeds[i + 1 :]:
            for shift in (0, 1, 4):
                assert abs((masks[a][shift:] * masks[b][: n - shift]).mean().item() * 4) < limit * 1.2, (a, b, shift)


def test_runs_of_kept_elements_are_as_long_as_chance_makes_them():
    kept = keep_mask((2_000_000,), 0.5, seed=11)
    runs = torch.unique_consecutive(kept, return_counts=True)[1]
    for length in range(1, 9):
        expected = 0.5**length
        share = (runs == length).double().mean().item()
        assert abs(share - expected) < 5 * (expected / len(runs)) ** 0.5


def test_windows_of_eight_draws_hit_every_pattern_equally():
    kept = keep_mask((8_000_000,), 0.5, seed=23).view(-1, 8).long()
    counts = torch.bincount((kept * (2 ** torch.arange(8))).sum(1), minlength=256).double()
    expected = 1_000_000 / 256
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (3, 7, 11), (300_001,)])
def test_the_values_are_those_of_the_definition_in_every_type(dtype, shape):
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    kept = keep_mask(x.shape, 0.3, seed=5)
    scale = 32768 / (32768 - round(0.3 * 32768))
    assert torch.equal(dropout(x, 0.3, seed=5), torch.where(kept, x, torch.zeros((), dtype=dtype)) * scale)


def test_the_backward_pass_replays_the_mask():
    x = torch.randn(4, 33, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: dropout(v, 0.4, seed=9), (x,))
    y = dropout(x, 0.4, seed=9)
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(grad != 0, y != 0)


def test_a_transposed_input_drops_by_its_own_index_order():
    x = torch.randn(6, 9)
    assert torch.equal(dropout(x.T, 0.5, seed=2), dropout(x.T.contiguous(), 0.5, seed=2))


def test_threads_do_not_change_the_mask():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = keep_mask((500_000,), 0.2, seed=4)
        torch.set_num_threads(2)
        assert torch.equal(one, keep_mask((500_000,), 0.2, seed=4))
    finally:
        torch.set_num_threads(before)


def test_the_plain_switch_keeps_the_bits():
    x = torch.randn(1000, dtype=torch.bfloat16)
    with plain():
        slow = dropout(x, 0.1, seed=6)
    assert torch.equal(slow, dropout(x, 0.1, seed=6))


def test_an_infinite_input_that_is_dropped_becomes_zero():
    x = torch.full((1000,), float("inf"))
    assert set(dropout(x, 0.5, seed=1).tolist()) == {0.0, float("inf")}


def test_nothing_reads_the_ambient_generator():
    state = torch.get_rng_state()
    dropout(torch.randn(3, generator=torch.Generator().manual_seed(0)), 0.5, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_a_probability_outside_its_range_is_refused():
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ConfigError, match="dropout: p"):
            dropout(torch.ones(3), p, seed=0)


@pytest.mark.parametrize(("p", "level"), [(0.0, 0), (0.5, _LEVELS // 2), (1 - 1e-9, _LEVELS - 1)])
def test_a_share_becomes_the_nearest_level_and_never_all(p, level):
    assert _levels(p) == level

"""Updates that stand still equal the plain formula, for one update and for one a row."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError
from luthier.kernels import GroupedScales, GroupedUpdates, Packed, StillSiblings, StillUpdate, Update, can_pack


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update(rank: int, scale: float) -> Update:
    return Update(numbers(rank, 7, seed=rank), numbers(5, rank, seed=rank + 1), scale)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
def test_one_update_equals_the_formula(shape: tuple[int, ...]) -> None:
    x, weight, bias, one = numbers(*shape), numbers(5, 7, seed=1), numbers(5, seed=2), update(3, 1.7)
    expected = F.linear(x, weight, bias) + x @ one.a.T @ one.b.T * 1.7
    assert torch.allclose(StillUpdate(weight, bias, one)(x), expected, atol=1e-12)
    assert torch.allclose(StillUpdate(weight, None, one)(x), expected - bias, atol=1e-12)


def test_a_packed_weight_and_its_update_in_one_product_equal_the_formula_to_rounding() -> None:
    x, weight, bias = (t.bfloat16() for t in (numbers(9, 32), numbers(48, 32, seed=1), numbers(48, seed=2)))
    if not can_pack(weight):
        return  # nothing is packed on this machine
    one = Update(numbers(4, 32, seed=3).float(), numbers(48, 4, seed=4).float(), 0.5)
    expected = (
        F.linear(x.double(), weight.double(), bias.double()) + x.double() @ one.a.T.double() @ one.b.T.double() / 2
    )
    for some_bias in (bias, None):
        packed = Packed(weight)
        with torch.inference_mode():
            found = StillUpdate(packed, some_bias, one)(x)
        wanted = expected if some_bias is not None else expected - bias.double()
        assert found.is_contiguous() and found.dtype == torch.bfloat16
        assert (found.double() - wanted).norm() < 1e-2 * wanted.norm()


def test_each_row_gets_its_own_update_and_rows_without_one_stay() -> None:
    updates = [update(3, 1.7), update(1, 0.3), update(4, -2.0)]
    grouped = GroupedUpdates(updates, torch.float64)
    x, y, index = numbers(5, 2, 7), numbers(5, 2, 5, seed=9), torch.tensor([2, 3, 0, 0, 1])
    found = grouped.after(x, y.clone(), index)
    for i, k in enumerate(index.tolist()):
        more = 0 if k == 3 else x[i] @ updates[k].a.T @ updates[k].b.T * updates[k].scale
        assert torch.allclose(found[i], y[i] + more, atol=1e-12)
    assert torch.equal(found[1], y[1]) and grouped.before(x, index) is x


@pytest.mark.parametrize("inputs", [True, False])
def test_each_row_gets_its_own_scale(inputs: bool) -> None:
    factors = [numbers(7, seed=1), numbers(7, seed=2)]
    grouped = GroupedScales(factors, torch.float64, inputs=inputs)
    x, index = numbers(3, 2, 7), torch.tensor([1, 2, 0])
    expected = torch.stack([x[0] * factors[1], x[1], x[2] * factors[0]])
    assert torch.equal(grouped.before(x, index), expected if inputs else x)
    assert torch.equal(grouped.after(x, x, index), x if inputs else expected)


def test_updates_of_different_sites_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"share d_in and d_out.*\(6, 5\).*\(7, 5\)"):
        GroupedUpdates([update(2, 1.0), Update(numbers(2, 6), numbers(5, 2), 1.0)], torch.float64)
    with pytest.raises(ConfigError, match="no update"):
        GroupedUpdates([], torch.float64)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7)])
@pytest.mark.parametrize("which", ["all", "some", "none"])
def test_layers_that_read_one_x_as_one_product_equal_each_by_itself(shape: tuple[int, ...], which: str) -> None:
    x, widths = numbers(*shape), (5, 2, 4)
    weights = [numbers(n, 7, seed=n) for n in widths]
    biases = [numbers(5, seed=1), None, numbers(4, seed=2)] if which != "none" else [None] * 3
    updates = [
        Update(numbers(3, 7, seed=3), numbers(5, 3, seed=4), 1.7),
        None,
        Update(x.new_ones(1, 7), x.new_ones(4, 1), -2),
    ]
    if which != "some":
        updates[1] = Update(numbers(2, 7, seed=5), numbers(2, 2, seed=6), 0.3)
    if which == "none":
        updates = [None] * 3
    found = StillSiblings(list(zip(weights, biases, updates, strict=True)))(x)
    for y, weight, bias, one in zip(found, weights, biases, updates, strict=True):
        more = 0 if one is None else x @ one.a.T @ one.b.T * one.scale
        assert y.is_contiguous() and torch.allclose(y, F.linear(x, weight, bias) + more, atol=1e-12)


def test_packed_layers_as_one_product_equal_the_formula_to_rounding_and_share_no_memory() -> None:
    x, weights = numbers(9, 32).bfloat16(), [numbers(n, 32, seed=n).bfloat16() for n in (48, 16, 32)]
    one = Update(numbers(4, 32, seed=3).float(), numbers(16, 4, seed=4).float(), 0.7)
    layers = [(weights[0], None, None), (weights[1], numbers(16).bfloat16(), one), (weights[2], None, None)]
    with torch.inference_mode():
        found = StillSiblings(layers)(x)
        before = [y.clone() for y in found]
        found[0].zero_()
    assert all(torch.equal(y, then) for y, then in zip(found[1:], before[1:], strict=True))
    for y, (weight, bias, update) in zip(before, layers, strict=True):
        more = 0.0 if update is None else x.double() @ update.a.double().T @ update.b.double().T * update.scale
        wanted = F.linear(x.double(), weight.double(), None if bias is None else bias.double()) + more
        assert (y.double() - wanted).norm() < 1e-2 * wanted.norm()

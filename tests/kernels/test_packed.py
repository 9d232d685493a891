"""A packed weight gives what the plain product gives, forward and backward, and knows when it is stale."""

import pytest
import torch
from torch.testing import assert_close

from luthier import kernels
from luthier.kernels import Packed, can_pack, low_rank_linear, packed_linear

needs_bf16 = pytest.mark.skipif(
    not can_pack(torch.zeros(2, 2, dtype=torch.bfloat16)), reason="no fast bf16 on this CPU"
)


def _parts(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(torch.bfloat16)
    return draw(rows, 40), draw(56, 40), draw(56), draw(rows, 56)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 7, 130, 1500])
def test_it_is_the_plain_product_to_rounding(rows: int) -> None:
    x, weight, bias, grad = _parts(rows)
    packed = Packed(weight)
    found = []
    for compute in (lambda t: packed_linear(t, packed, bias), lambda t: torch.nn.functional.linear(t, weight, bias)):
        given = x.clone().requires_grad_()
        y = compute(given)
        y.backward(grad)
        found.append((y.detach(), given.grad))
    wide = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    for y, gradient in found:
        # bf16 keeps 8 bits: both are within one rounding of the float64 result.
        assert_close(y.double(), wide, rtol=2**-7, atol=2**-5)
        assert gradient is not None
        assert_close(gradient.double(), grad.double() @ weight.double(), rtol=2**-7, atol=2**-4)


@needs_bf16
def test_a_low_rank_update_takes_a_packed_weight() -> None:
    x, weight, bias, _ = _parts(64)
    a, b = torch.randn(3, 40), torch.randn(56, 3)
    plain = low_rank_linear(x, weight, bias, a, b, 0.5)
    assert_close(low_rank_linear(x, Packed(weight), bias, a, b, 0.5), plain, rtol=2**-7, atol=2**-5)
    with kernels.plain():
        assert_close(low_rank_linear(x, Packed(weight), bias, a, b, 0.5), plain, rtol=2**-6, atol=2**-4)


@needs_bf16
def test_it_is_stale_once_the_weight_is_written_to_or_moved() -> None:
    for change in ("write", "move"):
        weight = torch.nn.Parameter(_parts(3)[1], requires_grad=False)
        packed = Packed(weight)
        assert packed.fresh
        if change == "write":
            with torch.no_grad():
                weight.mul_(2)
        else:
            weight.data = weight.data.clone()
        assert not packed.fresh


def test_fp32_weights_are_not_packed() -> None:
    assert not can_pack(torch.zeros(4, 4))


def test_without_a_gradient_the_rows_go_through_the_packed_product_and_come_back_in_their_shape() -> None:
    x, weight, bias = torch.randn(2, 3, 5), torch.randn(7, 5), torch.randn(7)

    class Stub:  # stands for `Packed` where the CPU has no product of packed bf16
        dtype, seen = torch.float32, 0

        def __len__(self) -> int:
            return len(weight)

        def linear(self, rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            self.seen += len(rows)
            return torch.nn.functional.linear(rows, weight, bias)

    stub = Stub()
    assert_close(packed_linear(x, stub, bias), torch.nn.functional.linear(x, weight, bias))  # type: ignore[arg-type]
    assert stub.seen == 6

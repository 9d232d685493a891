"""What a fast function gives belongs to whoever called it: models write into their projections' outputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from luthier.kernels import attachments, dropout, frozen, low_rank, plain
from luthier.kernels.packed import Packed, can_pack, packed_linear

N, T, D_IN, D_OUT, RANK = 2, 5, 8, 6, 3


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


A, B = drawn(RANK, D_IN, seed=1), drawn(D_OUT, RANK, seed=2)
WEIGHT, BIAS, SIZE = drawn(D_OUT, D_IN, seed=3), drawn(D_OUT, seed=4), drawn(D_OUT, seed=5).abs() + 1
NARROW, WIDE = drawn(RANK, D_IN, seed=6), drawn(D_IN, RANK, seed=7)

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "low_rank_linear": lambda x: low_rank.low_rank_linear(x, WEIGHT, BIAS, A, B, 0.5),
    "dora_linear": lambda x: low_rank.dora_linear(x, WEIGHT, BIAS, A, B, SIZE, 0.5),
    "rms_norm": lambda x: frozen.rms_norm(x, drawn(D_IN, seed=8), 1e-6),
    "scale": lambda x: attachments.scale(x, drawn(D_IN, seed=9)),
    "bottleneck": lambda x: attachments.bottleneck(x, x, NARROW, None, WIDE, None),
    "dropout": lambda x: dropout(x, 0.3, 7),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_result_may_be_changed_in_place_and_the_gradient_is_that_of_the_plain_formula(name: str) -> None:
    found = []
    for by_formula in (True, False):
        x = drawn(N, T, D_IN).requires_grad_()
        with plain(by_formula):
            y = FUNCTIONS[name](x * 1.0)
            y /= 3.0
            y += 2.0
            (y.clamp_(-1, 9) * drawn(*y.shape, seed=11)).sum().backward()
        found.append((y.detach(), x.grad))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_a_packed_layers_result_may_be_changed_in_place() -> None:
    weight = drawn(64, 64, seed=3, dtype=torch.bfloat16)
    if not can_pack(weight):
        pytest.skip("this processor packs no weights")
    x = drawn(N, T, 64, dtype=torch.bfloat16).requires_grad_()
    y = packed_linear(x, Packed(weight), None)
    y /= 2.0
    y.sum().backward()
    torch.testing.assert_close(x.grad, (weight.sum(0) / 2).expand(N, T, -1), atol=5e-2, rtol=5e-2)

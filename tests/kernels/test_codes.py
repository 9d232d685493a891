"""Weights in codes: each format against a plain loop, its bytes, and the layer that reads it."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from luthier.kernels import FORMATS, StoredLinear, low_rank_linear

LEVELS = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022833425,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
SHAPES = [(48, 64), (5, 7), (96, 200), (300, 70)]


def drawn(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def round_trip(name: str, weight: Tensor) -> Tensor:
    form = FORMATS[name]
    return form.decode(form.encode(weight), (weight.shape[0], weight.shape[1]))


def plain_nf4(weight: Tensor) -> Tensor:
    numbers = weight.flatten().tolist()
    blocks = [numbers[at : at + 64] for at in range(0, len(numbers), 64)]
    largest = [max(abs(n) for n in block) for block in blocks]
    mean = sum(largest) / len(largest)
    out: list[float] = []
    for k, block in enumerate(blocks):
        family = largest[k - k % 256 : k - k % 256 + 256]
        step = max(abs(c - mean) for c in family) / 127
        c = mean + (round((largest[k] - mean) / step) * step if step else 0)
        out += [max(c, 0) * min(LEVELS, key=lambda level, n=n, k=k: abs(level - n / largest[k])) for n in block]
    return torch.tensor(out).view(weight.shape)


def plain_groups(weight: Tensor, top: int) -> Tensor:
    rows = []
    for row in weight.tolist():
        out: list[float] = []
        for at in range(0, len(row), 32):
            group = row[at : at + 32]
            low, high = min(group), max(group)
            alpha = float(torch.tensor((high - low) / top).bfloat16())
            out += [low + alpha * min(top, max(0, round((n - low) / alpha))) for n in group]
        rows.append(out)
    return torch.tensor(rows)


def plain_int8(weight: Tensor) -> Tensor:
    scale = weight.abs().max(1, keepdim=True).values / 127
    return (weight / scale).round() * scale


PLAIN = {
    "nf4": plain_nf4,
    "int8": plain_int8,
    "int4": lambda w: plain_groups(w, 15),
    "int2": lambda w: plain_groups(w, 3),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_format_is_what_a_plain_loop_makes(name: str, shape: tuple[int, int]) -> None:
    weight = drawn(shape)
    found, wanted = round_trip(name, weight), PLAIN[name](weight)
    # A number that lies between two levels may go either way; there are few of them.
    assert ((found - wanted).abs() > 1e-5).float().mean() < 2e-3
    assert abs(float((found - weight).norm() - (wanted - weight).norm())) < 1e-3 * float((wanted - weight).norm())


BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "int8": 8 + 32 / 512, "int4": 4 + 48 / 32, "int2": 2 + 48 / 32}


@pytest.mark.acid("qlora", 3)
@pytest.mark.parametrize("name", list(FORMATS))
def test_qlora_bits_a_weight(name: str) -> None:
    parts = FORMATS[name].encode(drawn((512, 512)))
    bits = 8 * sum(p.nbytes for p in parts.values()) / 512**2
    assert bits == pytest.approx(BITS[name], abs=1e-3)
    assert name != "nf4" or bits <= 4.13


@pytest.mark.acid("qlora", 1)
def test_qlora_the_sixteen_levels_are_read_as_they_were_written() -> None:
    weight = torch.tensor(LEVELS).repeat(4, 4)  # each block holds all levels, so all constants are one
    assert torch.equal(round_trip("nf4", 3 * weight), 3 * weight)


@pytest.mark.acid("qlora", 2)
def test_qlora_a_block_with_one_number_reproduces_it() -> None:
    weight = torch.zeros(1, 64)
    weight[0, 17] = -0.0123
    assert torch.equal(round_trip("nf4", weight), weight)


@pytest.mark.acid("qlora", 5)
def test_qlora_nf4_is_closer_to_normal_numbers_than_even_steps_and_than_fp4() -> None:
    weight = drawn((1024, 512))
    blocks = weight.view(-1, 64)
    unit = blocks / blocks.abs().amax(1, keepdim=True)
    even = (unit * 7).round() / 7
    fp4 = torch.tensor([0, 0.0052, 0.6667, 1.0, 0.3333, 0.5, 0.1667, 0.25])  # the e2m1 levels that bitsandbytes has
    near = torch.cat([fp4, -fp4])
    as_fp4 = near[(unit.flatten()[:, None] - near).abs().argmin(1)].view_as(unit)
    found = (round_trip("nf4", weight) - weight).square().mean()
    for other in (even, as_fp4):
        assert found < ((other - unit) * blocks.abs().amax(1, keepdim=True)).square().mean()
    assert found.sqrt() < 0.0925  # 0.09199 where block constants are in fp32


@pytest.mark.parametrize("name", list(FORMATS))
def test_zero_and_constant_rows_stay_what_they_are(name: str) -> None:
    assert torch.equal(round_trip(name, torch.zeros(3, 70)), torch.zeros(3, 70))
    torch.testing.assert_close(round_trip(name, torch.full((3, 70), 0.25)), torch.full((3, 70), 0.25))


def layer(name: str = "nf4", dtype: torch.dtype = torch.float32, bias: bool = True) -> StoredLinear:
    held = nn.Parameter(drawn((1, 48), 3)[0].to(dtype)) if bias else None
    return StoredLinear(drawn((48, 70)), held, FORMATS[name], dtype)


@pytest.mark.parametrize("name", list(FORMATS))
def test_a_layer_computes_with_its_decoded_weight_and_gives_the_gradient_of_its_input_and_bias(name: str) -> None:
    stored = layer(name)
    x = drawn((6, 70), 1).view(2, 3, 70).requires_grad_()
    y = stored(x)
    y.square().sum().backward()
    plain = nn.Linear(70, 48)
    plain.weight.data, plain.bias.data = stored.decoded(), stored.bias.data.clone()
    twin = x.detach().clone().requires_grad_()
    z = plain(twin)
    z.square().sum().backward()
    assert torch.equal(y, z)
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(stored.bias.grad, plain.bias.grad)
    assert [n for n, _ in stored.named_parameters()] == ["bias"]


@pytest.mark.parametrize("fused", [False, True])
def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass(fused: bool) -> None:
    stored, sizes = layer(bias=False), []
    x = drawn((6, 70), 1).requires_grad_()
    a, b = (drawn(s, 5).requires_grad_() for s in ((2, 70), (48, 2)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        y = low_rank_linear(x, stored.held, None, a, b, 0.5) if fused else stored(x)
    y.sum().backward()
    assert max(sizes, default=0) < 48 * 70
    assert x.grad is not None and (not fused or a.grad is not None)


def test_casting_and_moving_a_layer_changes_none_of_its_codes_and_constants() -> None:
    for name in FORMATS:
        stored = layer(name)
        before = {n: b.clone() for n, b in stored.named_buffers()}
        cast = copy.deepcopy(stored).to(torch.bfloat16)
        assert all(torch.equal(b, before[n]) and b.dtype == before[n].dtype for n, b in cast.named_buffers())
        assert cast.dtype == torch.bfloat16 and cast.bias.dtype == torch.bfloat16
        assert torch.equal(cast.weight, stored.weight.bfloat16())
        assert cast(drawn((3, 70)).bfloat16()).dtype == torch.bfloat16


def test_a_layer_goes_through_its_state_dict() -> None:
    stored = layer()
    other = StoredLinear(drawn((48, 70), 9), nn.Parameter(torch.zeros(48)), FORMATS["nf4"], torch.float32)
    assert not torch.equal(other.weight, stored.weight)
    other.load_state_dict(stored.state_dict())
    assert torch.equal(other.weight, stored.weight)


def test_under_autocast_a_layer_computes_in_its_type() -> None:
    stored = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = stored(drawn((3, 70)))
    assert y.dtype == torch.bfloat16
    wanted = nn.functional.linear(drawn((3, 70)).bfloat16(), stored.weight.bfloat16(), stored.bias.bfloat16())
    torch.testing.assert_close(y, wanted)


def test_a_layer_of_a_transposed_kin_shows_its_weight_as_that_one_does() -> None:
    stored = StoredLinear(drawn((48, 70)), None, FORMATS["int8"], torch.float32, transposed=True)
    assert tuple(stored.weight.shape) == stored.stored_shape == (70, 48)
    assert math.prod(stored.stored_shape) == 48 * 70

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import ConfigError, UnknownName
from luthier.kernels import (
    bottleneck,
    dora_linear,
    dora_norm,
    dropout,
    low_rank_linear,
    plain,
    row_squares,
    scale,
)

N, T, D_IN, RANK, D_OUT = 3, 5, 7, 2, 4


def _r(*shape: int, grad: bool = False, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) * 31 + len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def _site() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, the frozen weight and bias, A, B"""
    return (
        _r(N, T, D_IN, grad=True),
        _r(D_OUT, D_IN),
        _r(D_OUT),
        _r(RANK, D_IN, grad=True),
        _r(D_OUT, RANK, grad=True),
    )


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("biased", [False, True])
def test_a_low_rank_site_equals_the_formula(p: float, biased: bool) -> None:
    x, w, bias, a, b = _site()
    ours = low_rank_linear(x, w, bias if biased else None, a, b, 0.5, p, 3)
    wanted = F.linear(x, w, bias if biased else None) + 0.5 * (dropout(x, p, 3) @ a.T @ b.T)
    torch.testing.assert_close(ours, wanted)
    g = _r(N, T, D_OUT)
    for got, want in zip(
        torch.autograd.grad(ours, (x, a, b), g), torch.autograd.grad(wanted, (x, a, b), g), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_low_rank_site_has_the_gradients_of_finite_differences(p: float) -> None:
    x, w, bias, a, b = _site()
    assert torch.autograd.gradcheck(lambda x, a, b: low_rank_linear(x, w, bias, a, b, 0.5, p, 11), (x, a, b))


def test_an_input_without_gradient_gets_none() -> None:
    x, w, bias, a, b = _site()
    ga, gb = torch.autograd.grad(low_rank_linear(x.detach(), w, bias, a, b, 1.0).sum(), (a, b))
    assert ga.shape == a.shape and gb.shape == b.shape


def test_a_base_that_trains_gets_its_gradient_too() -> None:
    x, w, bias, a, b = _site()
    (gw,) = torch.autograd.grad(low_rank_linear(x, w.requires_grad_(), bias, a, b, 1.0).sum(), w)
    torch.testing.assert_close(gw, x.detach().sum((0, 1)).expand_as(w))


def test_only_x_and_the_thin_product_are_saved() -> None:
    x, w, bias, a, b = _site()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        low_rank_linear(x, w, bias, a, b, 1.0, 0.5, 3)
    pointers = {t.data_ptr() for t in (x, a, b)}
    new = [t for t in saved if t.data_ptr() not in pointers]
    assert [t.shape for t in new] == [(N * T, RANK)]


def test_a_bf16_base_trains_fp32_updates_close_to_the_exact_gradient() -> None:
    x, w, bias, a64, b64 = _site()
    low = [t.detach().to(torch.bfloat16) for t in (x, w, bias)]
    a, b = (t.detach().float().requires_grad_() for t in (a64, b64))
    y = low_rank_linear(low[0], low[1], low[2], a, b, 0.5)
    assert y.dtype == torch.bfloat16
    ga, gb = torch.autograd.grad(y.sum(), (a, b))
    assert ga.dtype == gb.dtype == torch.float32
    exact = torch.autograd.grad(low_rank_linear(x, w, bias, a64, b64, 0.5).sum(), (a64, b64))
    for got, want in zip((ga, gb), exact, strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


def test_plain_gives_the_same_values() -> None:
    x, w, bias, a, b = _site()
    quick = low_rank_linear(x, w, bias, a, b, 0.5, 0.2, 4)
    with plain():
        torch.testing.assert_close(quick, low_rank_linear(x, w, bias, a, b, 0.5, 0.2, 4))


def test_dropout_without_a_seed_is_refused() -> None:
    x, w, bias, a, b = _site()
    with pytest.raises(ConfigError, match="needs a seed"):
        low_rank_linear(x, w, bias, a, b, 1.0, 0.2)
    with pytest.raises(ConfigError, match=r"dora_linear: p=0\.2 needs a seed"):
        dora_linear(x, w, bias, a, b, w.norm(dim=1), 1.0, 0.2)


def test_the_norm_of_dora_is_that_of_the_whole_weight() -> None:
    w, a, b = _r(9, 7), _r(2, 7), _r(9, 2)
    want = (w + 1.5 * b @ a).norm(dim=1)
    torch.testing.assert_close(dora_norm(w, a, b, 1.5), want)
    torch.testing.assert_close(dora_norm(w, a, b, 1.5, row_squares(w)), want)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dora_equals_its_formula(with_bias: bool, p: float) -> None:
    x, w, a, b = _r(N, T, 7, grad=True), _r(9, 7), _r(2, 7, grad=True), _r(9, 2, grad=True)
    m, bias = _r(9, grad=True), _r(9, 1).squeeze(1) if with_bias else None
    norm = (w + 1.5 * b @ a).norm(dim=1).detach()
    want = m / norm * (x @ w.T + 1.5 * dropout(x, p, 8) @ a.T @ b.T)
    want = want if bias is None else want + bias
    got = dora_linear(x, w, bias, a, b, m, 1.5, p, 8)
    torch.testing.assert_close(got, want)
    g = _r(N, T, 9)
    leaves = (x, a, b, m)
    for ours, theirs in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g), strict=True):
        torch.testing.assert_close(ours, theirs)
    with plain():
        torch.testing.assert_close(dora_linear(x, w, bias, a, b, m, 1.5, p, 8), want)


def test_scale_has_the_right_gradients() -> None:
    y, l = _r(N, T, 7, grad=True), _r(7, grad=True)
    assert torch.autograd.gradcheck(scale, (y, l))
    assert torch.autograd.gradcheck(lambda l: scale(y.detach(), l), (l,))
    assert torch.equal(scale(y, l), y * l)
    assert scale(y.bfloat16(), l.float()).dtype == torch.bfloat16


def test_scale_saves_nothing_large_when_its_factors_are_frozen() -> None:
    y, l = _r(N, T, 7, grad=True), _r(7)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        scale(y, l)
    assert [t.shape for t in saved] == [l.shape]


@pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"])
@pytest.mark.parametrize("biased", [True, False])
def test_the_bottleneck_has_the_right_gradients(activation: str, biased: bool) -> None:
    y, x = _r(N, T, 6, grad=True), _r(N, T, 7, grad=True)
    d, u = _r(3, 7, grad=True), _r(6, 3, grad=True)
    c, e = (_r(3, grad=True), _r(6, grad=True)) if biased else (None, None)
    act = {"identity": lambda h: h, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
    act["gelu_tanh"] = lambda h: F.gelu(h, approximate="tanh")
    want = y + 0.7 * F.linear(act[activation](F.linear(x, d, c)), u, e)
    torch.testing.assert_close(bottleneck(y, x, d, c, u, e, 0.7, activation), want)
    with plain():
        torch.testing.assert_close(bottleneck(y, x, d, c, u, e, 0.7, activation), want)
    assert torch.autograd.gradcheck(lambda *t: bottleneck(*t, 0.7, activation), (y, x, d, c, u, e))


def test_the_bottleneck_may_read_what_it_adds_to() -> None:
    y, d, u = _r(N, T, 6, grad=True), _r(3, 6, grad=True), _r(6, 3, grad=True)
    assert torch.autograd.gradcheck(lambda y, d, u: bottleneck(y, y, d, None, u, None), (y, d, u))


def test_inside_autocast_streams_of_its_type_take_the_fused_functions_and_others_the_plain_ones() -> None:
    y, x = (_r(N, T, D_OUT, dtype=torch.bfloat16, grad=True) for _ in range(2))
    down, up, factors = _r(2, D_OUT).float(), _r(D_OUT, 2).float(), _r(D_OUT).float()
    alone = bottleneck(y, x, down, None, up, None)
    with torch.autocast("cpu", torch.bfloat16):
        inside = bottleneck(y, x, down, None, up, None)
        scaled = scale(y, factors.requires_grad_())
        wide = bottleneck(y.float(), x.float(), down, None, up, None)
    assert torch.equal(inside, alone) and inside.dtype == torch.bfloat16
    assert inside.grad_fn is not None
    assert type(inside.grad_fn.next_functions[0][0]).__name__ == "_BottleneckBackward"  # behind a view
    assert type(scaled.grad_fn).__name__ == "_ScaleBackward"
    assert type(wide.grad_fn).__name__ == "AddBackward0"


def test_an_unknown_activation_is_answered_with_near_ones() -> None:
    with pytest.raises(UnknownName, match="gelu"):
        bottleneck(_r(1, 6), _r(1, 7), _r(3, 7), None, _r(6, 3), None, 1.0, "geluu")

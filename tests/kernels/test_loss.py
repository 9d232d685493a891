import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import DataError
from luthier.kernels import linear_cross_entropy, plain

N, D, V = 11, 5, 13


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[[2, 3, 9]] = -100
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), labels


def _definition(h: Tensor, w: Tensor, b: Tensor | None, labels: Tensor, cap: float | None) -> Tensor:
    logits = F.linear(h, w, b)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    return F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("biased", [True, False])
def test_value_and_gradients_equal_the_definition_for_every_chunk(cap: float | None, rows: int, biased: bool) -> None:
    h, w, b, labels = _inputs()
    bias = b if biased else None
    loss, n = linear_cross_entropy(h, w, bias, labels, chunk_bytes=rows * V * 8, softcap=cap)
    want = _definition(h, w, bias, labels, cap)
    assert n == N - 3
    torch.testing.assert_close(loss, want)
    leaves = [h, w, b] if biased else [h, w]
    for got, exact in zip(
        torch.autograd.grad(loss * 0.3, leaves), torch.autograd.grad(want * 0.3, leaves), strict=True
    ):
        torch.testing.assert_close(got, exact)


def test_the_gradient_is_that_of_finite_differences() -> None:
    h, w, b, labels = _inputs()
    assert torch.autograd.gradcheck(lambda *t: linear_cross_entropy(*t, labels, chunk_bytes=400)[0], (h, w, b))


def test_a_frozen_head_leaves_only_the_gradient_of_the_hidden_states() -> None:
    h, w, b, labels = _inputs()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss, _ = linear_cross_entropy(h, w.detach(), b.detach(), labels)
    assert max(t.numel() for t in saved) <= N * D
    (gh,) = torch.autograd.grad(loss, h)
    assert gh[[2, 3, 9]].abs().max() == 0


def test_only_as_many_logits_as_allowed_exist_at_once() -> None:
    h = torch.randn(64, 4, requires_grad=True)
    w, labels = torch.randn(1000, 4), torch.arange(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(h, w, None, labels, chunk_bytes=2 * 1000 * 4)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * 1000 * 4


def test_a_trained_head_with_frozen_hidden_states_gets_its_gradient() -> None:
    h, w, _, labels = _inputs()
    (gw,) = torch.autograd.grad(linear_cross_entropy(h.detach(), w, None, labels)[0], w)
    (want,) = torch.autograd.grad(_definition(h.detach(), w, None, labels, None), w)
    torch.testing.assert_close(gw, want)


def test_bf16_products_stay_close_and_the_sum_is_fp32() -> None:
    h, w, b, labels = _inputs()
    low = [t.detach().bfloat16().requires_grad_() for t in (h, w, b)]
    loss, _ = linear_cross_entropy(*low, labels)
    assert loss.dtype == torch.float32
    exact = _definition(h, w, b, labels, None)
    assert abs(loss.item() - exact.item()) < 0.02 * exact.item()
    for got, want in zip(torch.autograd.grad(loss, low), torch.autograd.grad(exact, (h, w, b)), strict=True):
        assert got.dtype == torch.bfloat16
        assert (got - want).norm() < 0.03 * want.norm()


def test_an_fp32_head_may_multiply_in_bf16_and_keeps_gradients_of_its_own_type() -> None:
    h, w, b, labels = (t.detach().float() if t.is_floating_point() else t for t in _inputs())
    for t in (h, w, b):
        t.requires_grad_()
    loss, _ = linear_cross_entropy(h, w, b, labels, dtype=torch.bfloat16)
    low = [t.detach().bfloat16().requires_grad_() for t in (h, w, b)]
    same, _ = linear_cross_entropy(*low, labels)
    assert torch.equal(loss, same)
    for got, want in zip(torch.autograd.grad(loss, (h, w, b)), torch.autograd.grad(same, low), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.bfloat16(), want)
    with plain():
        slow, _ = linear_cross_entropy(h, w, b, labels, dtype=torch.bfloat16)
    torch.testing.assert_close(loss, slow, rtol=1e-2, atol=0)


def test_a_token_that_is_nearly_certain_keeps_its_small_gradient_in_bf16() -> None:
    h = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    w = torch.eye(2, dtype=torch.bfloat16)
    loss, _ = linear_cross_entropy(h, w, None, torch.tensor([0]))
    (g,) = torch.autograd.grad(loss, h)
    small = 1 / (1 + torch.tensor(8.0).exp())
    torch.testing.assert_close(g.float(), torch.tensor([[-small, small]]), rtol=2**-7, atol=0)


def test_no_supervised_token_gives_zero_and_a_zero_gradient() -> None:
    h, w, b, _ = _inputs()
    loss, n = linear_cross_entropy(h, w, b, torch.full((N,), -100))
    assert n == 0 and loss.item() == 0
    (g,) = torch.autograd.grad(loss, h)
    assert g.abs().max() == 0


def test_plain_gives_the_same_value() -> None:
    h, w, b, labels = _inputs()
    with plain():
        slow, n = linear_cross_entropy(h, w, b, labels, softcap=2.0)
    loss, m = linear_cross_entropy(h, w, b, labels, softcap=2.0)
    torch.testing.assert_close(loss, slow)
    assert n == m


def test_evaluation_makes_no_gradient() -> None:
    h, w, b, labels = _inputs()
    with torch.no_grad():
        loss, _ = linear_cross_entropy(h, w, b, labels)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, _definition(h, w, b, labels, None).detach())


@pytest.mark.parametrize("label", [V, -1])
def test_a_label_outside_the_head_is_refused(label: int) -> None:
    h, w, b, labels = _inputs()
    labels[0] = label
    with pytest.raises(DataError, match=f"label {label} "):
        linear_cross_entropy(h, w, b, labels)


def test_shapes_that_do_not_fit_are_refused() -> None:
    h, w, b, labels = _inputs()
    with pytest.raises(DataError, match="Flatten"):
        linear_cross_entropy(h.unsqueeze(0), w, b, labels)

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.core import UnknownName
from luthier.kernels import frozen, gated, plain, rms_norm


@pytest.fixture(autouse=True, params=[1 << 19, 100])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in many."""
    monkeypatch.setattr(frozen, "_PIECE_BYTES", request.param)


def _r(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("plus_one", [False, True])
def test_rms_norm_has_the_values_and_gradients_of_its_definition(plus_one: bool) -> None:
    x, w = _r(3, 5, 7), _r(7)
    want = (w + plus_one) * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_norm(x, w, 1e-5, plus_one), want)
    with plain():
        torch.testing.assert_close(rms_norm(x, w, 1e-5, plus_one), want)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5, plus_one), (x, w))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, w.detach(), 1e-5, plus_one), (x,))


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_has_the_values_and_gradients_of_its_definition(activation: str) -> None:
    gate, up = _r(3, 5, 7), _r(3, 5, 7) * 0.5
    up = up.detach().requires_grad_()
    act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
    torch.testing.assert_close(gated(gate, up, activation), act * up)
    with plain():
        torch.testing.assert_close(gated(gate, up, activation), act * up)
    assert torch.autograd.gradcheck(lambda a, b: gated(a, b, activation), (gate, up))
    assert torch.autograd.gradcheck(lambda b: gated(gate.detach(), b, activation), (up,))
    assert torch.autograd.gradcheck(lambda a: gated(a, up.detach(), activation), (gate,))


def test_bf16_gives_what_models_of_that_type_compute() -> None:
    gate, up, w = (t.detach().bfloat16() for t in (_r(6, 8), _r(8, 6).T, _r(8)))
    assert torch.equal(gated(gate, up), F.silu(gate) * up)
    v = gate.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(rms_norm(gate, w, 1e-5), w * v.bfloat16(), rtol=2**-7, atol=0)
    assert rms_norm(gate, w, 1e-5).dtype == torch.bfloat16


def test_only_the_inputs_and_a_number_per_row_are_saved() -> None:
    x, w, up = _r(6, 8), _r(8), _r(6, 8)
    for call, sizes in (
        (lambda: rms_norm(x, w, 1e-5), [6, 8, 48]),
        (lambda: gated(x, up), [48, 48]),
    ):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            call()
        assert sorted(saved) == sizes


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(UnknownName, match="silu"):
        gated(_r(1, 2), _r(1, 2), "relu")


def test_the_frameworks_frozen_layers_already_save_and_compute_no_more_than_needed() -> None:
    x, w, b = _r(6, 8), _r(8, 8).detach(), _r(8).detach()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(x, w, b)
    assert all(t.data_ptr() == w.data_ptr() for t in saved)

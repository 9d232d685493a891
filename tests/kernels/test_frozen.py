import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from luthier.kernels import frozen, plain, rms_norm


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


def test_bf16_gives_what_models_of_that_type_compute() -> None:
    x, w = (t.detach().bfloat16() for t in (_r(6, 8), _r(8)))
    v = x.float()
    v = v * torch.rsqrt(v.pow(2).mean(-1, keepdim=True) + 1e-5)
    torch.testing.assert_close(rms_norm(x, w, 1e-5), w * v.bfloat16(), rtol=2**-7, atol=0)
    assert rms_norm(x, w, 1e-5).dtype == torch.bfloat16


def test_only_the_inputs_and_a_number_per_row_are_saved() -> None:
    x, w = _r(6, 8), _r(8)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        rms_norm(x, w, 1e-5)
    assert sorted(saved) == [6, 8, 48]


def test_the_frameworks_frozen_layers_already_save_and_compute_no_more_than_needed() -> None:
    x, w, b = _r(6, 8), _r(8, 8).detach(), _r(8).detach()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.linear(x, w, b)
    assert all(t.data_ptr() == w.data_ptr() for t in saved)


def test_a_cpus_temporaries_are_bounded_for_each_thread_and_another_device_takes_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen, "_PIECE_BYTES", 1000)
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found = list(frozen._pieces(torch.empty(77, 10)))
        sizes = [len(range(77)[piece]) for piece in found]
        assert max(sizes) * 10 * 4 == 1000 * threads and sum(sizes) == 77
        assert [piece.start for piece in found] == [sum(sizes[:i]) for i in range(len(sizes))]
        assert list(frozen._pieces(torch.empty(77, 10, device="meta"))) == [slice(0, 77)]
    # A row wider than a piece stands alone.
    assert list(frozen._pieces(torch.empty(2, 5000))) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plus_one", [False, True])
def test_few_rows_without_a_gradient_have_the_bits_of_many(dtype: torch.dtype, plus_one: bool) -> None:
    x, w = (t.detach().to(dtype) for t in (_r(7, 11, 48), _r(48)))
    want = frozen._RMSNorm.apply(x, w, 1e-5, plus_one)
    found = rms_norm(x, w, 1e-5, plus_one)
    assert found.dtype == want.dtype == dtype
    assert torch.equal(found, want)
    x.requires_grad_()
    assert rms_norm(x, w, 1e-5, plus_one).requires_grad
    with torch.no_grad():
        assert torch.equal(rms_norm(x, w, 1e-5, plus_one), found)

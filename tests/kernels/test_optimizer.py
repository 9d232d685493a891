from typing import Any

import pytest
import torch
from torch import Tensor, nn

from luthier.kernels import adamw, plain

SHAPES = {"a": (3, 5), "bias": (7,), "b": (5, 2), "gain": (4,), "c": ()}
SETTINGS: dict[str, Any] = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6}


def draw(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for n, s in SHAPES.items()}


class Ours:
    """Values with their moments."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.values = draw(0, dtype)
        self.first = {n: torch.zeros_like(v) for n, v in self.values.items()}
        self.second = {n: torch.zeros_like(v) for n, v in self.values.items()}

    def step(self, count: int, gradients: dict[str, Tensor], **options: Any) -> None:
        tables = (self.values, gradients, self.first, self.second)
        adamw(*([table[n] for n in SHAPES] for table in tables), count=count, **{**SETTINGS, **options})


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_equals_the_frameworks_adamw(slow: bool, decay: float) -> None:
    ours = Ours()
    theirs = {n: nn.Parameter(v.clone()) for n, v in ours.values.items()}
    reference = torch.optim.AdamW(theirs.values(), **SETTINGS, weight_decay=decay, foreach=False)
    for step in range(7):
        for name, gradient in draw(100 + step).items():
            theirs[name].grad = gradient
        reference.step()
        with plain(slow):
            ours.step(step + 1, draw(100 + step), decay=decay)
        for name, value in ours.values.items():
            torch.testing.assert_close(value, theirs[name].detach(), rtol=1e-9, atol=1e-12)


def test_the_fused_call_is_the_one_that_runs_and_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    import luthier.kernels.optimizer as module

    inner, calls = module._FUSED, [0]

    def counted(*args: Any, **kwargs: Any) -> None:
        calls[0] += 1
        inner(*args, **kwargs)

    monkeypatch.setattr(module, "_FUSED", counted)
    Ours().step(1, draw(1))
    assert calls == [1]
    with plain():
        Ours().step(1, draw(1))
    assert calls == [1]


@pytest.mark.parametrize("slow", [False, True])
def test_decay_pulls_to_where_it_rests(slow: bool) -> None:
    ours = Ours()
    before = {n: v.clone() for n, v in ours.values.items()}
    nothing = {n: torch.zeros_like(v) for n, v in before.items()}
    with plain(slow):
        ours.step(1, nothing, lr=0.5, decay=0.1, rest=1.0)
    for name, value in ours.values.items():
        torch.testing.assert_close(value, before[name] + 0.05 * (1 - before[name]))


def test_tensors_that_lie_otherwise_in_memory_are_updated_as_what_they_are() -> None:
    straight, turned = Ours(), Ours()
    gradients = draw(1)
    straight.step(1, gradients)
    turned.step(1, {n: g.t().contiguous().t() if g.dim() == 2 else g for n, g in gradients.items()})
    for table in (turned.values, turned.first, turned.second):
        for name in ("a", "b"):
            table[name] = table[name].t().contiguous().t()
    straight.step(2, gradients)
    turned.step(2, gradients)
    for name, value in straight.values.items():
        torch.testing.assert_close(turned.values[name], value, rtol=1e-12, atol=1e-12)


def test_whoever_keeps_something_of_a_parameter_sees_that_it_moved() -> None:
    ours = Ours(torch.float32)
    versions = {n: v._version for n, v in ours.values.items()}
    ours.step(1, draw(1, torch.float32))
    assert all(v._version > versions[n] for n, v in ours.values.items())


def test_fused_and_plain_agree_in_the_type_that_trains() -> None:
    fused, slow = Ours(torch.float32), Ours(torch.float32)
    for step in range(5):
        fused.step(step + 1, draw(step, torch.float32), decay=0.1)
        with plain():
            slow.step(step + 1, draw(step, torch.float32), decay=0.1)
    for name, value in fused.values.items():
        torch.testing.assert_close(value, slow.values[name], rtol=2e-6, atol=2e-6)

"""The pull of numbers to where they were: its value and gradient, in pieces and by few operations."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.training import pull as module
from luthier.training.pull import pull


def tables(*shapes):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draw) for shape in shapes]


@pytest.mark.parametrize("stiff", [False, True])
def test_the_pull_and_its_gradient_are_those_of_the_plain_sum(monkeypatch, stiff):
    monkeypatch.setattr(module, "PIECE", 7)
    shapes = ((3, 5), (8,), (2, 4), ())
    values, rests, fisher = ([t.requires_grad_() for t in tables(*shapes)], tables(*shapes)[::1], tables(*shapes))
    rests = [r + 1 for r in rests]
    values[2] = values[2].detach().t().requires_grad_()  # not one block of memory
    rests[2], fisher[2], rests[1] = rests[2].t(), fisher[2].t(), None
    weights, hard = [0.1, 0.7, 2.0, 1.0], [f.square() for f in fisher]
    plain = sum(
        (w / 2 * (h if stiff else 1.0) * (v - (0.0 if r is None else r)).square()).sum()
        for v, r, w, h in zip(values, rests, weights, hard, strict=True)
    )
    slopes = torch.autograd.grad(plain, values)
    assert all(s.any() for s in slopes)
    there = [torch.randn(v.shape) for v in values]
    for value, grad in zip(values[:3], there, strict=False):
        value.grad = grad.clone()  # of a loss; the last has none yet
    assert pull(values, rests, weights, hard if stiff else None) == pytest.approx(plain.item(), rel=1e-5)
    there[3].zero_()
    for value, grad, slope in zip(values, there, slopes, strict=True):
        torch.testing.assert_close(value.grad, grad + slope)
    values[1].requires_grad_(False).grad = None
    pull(values, rests, weights)
    assert values[1].grad is None, "what rests takes no gradient"


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write, of tables larger than a piece: what does not stay in a cache."""

    def __init__(self, smallest):
        super().__init__()
        self.smallest, self.bytes = smallest, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            told = [*args, *(out if isinstance(out, tuple) else (out,))]
            self.bytes += sum(t.nbytes for t in told if isinstance(t, torch.Tensor) and t.numel() > self.smallest)
        return out


def test_the_pull_makes_no_table_of_the_models_size(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    (value,), (rest,) = tables((8, 1000)), tables((8, 1000))
    rest, value = rest + 1, value.requires_grad_()
    value.grad = torch.zeros_like(value)

    def plain():
        (0.1 / 2 * (value - rest).square().sum()).backward()

    moved = {}
    for name, made in (("ours", lambda: pull([value], [rest], [0.1])), ("plain", plain)):
        with Traffic(2000) as traffic:  # the two buffers of a piece are one table
            made()
        moved[name] = traffic.bytes / value.nbytes
    assert moved["plain"] >= 8 and moved["ours"] == 0, "pieces of the cache aside, which read three tables in all"

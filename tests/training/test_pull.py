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
    found = pull(values, rests, weights, hard if stiff else None)
    plain = sum(
        (w / 2 * (h if stiff else 1.0) * (v - (0.0 if r is None else r)).square()).sum()
        for v, r, w, h in zip(values, rests, weights, hard, strict=True)
    )
    torch.testing.assert_close(found, plain)
    slopes = torch.autograd.grad(3 * plain, values)
    torch.testing.assert_close(torch.autograd.grad(3 * found, values), slopes)
    assert all(s.any() for s in slopes)


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


def test_the_pull_moves_large_tables_through_memory_once(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    (value,), (rest,) = tables((8, 1000)), tables((8, 1000))
    rest, value = rest + 1, value.requires_grad_()
    moved = {}
    for name, penalty in (("ours", lambda: pull([value], [rest], [0.1])),
                          ("plain", lambda: 0.1 / 2 * (value - rest).square().sum())):  # fmt: skip
        with Traffic(1000) as traffic:
            torch.autograd.grad(penalty(), value)
        moved[name] = traffic.bytes / value.nbytes
    assert moved["plain"] >= 8 and moved["ours"] <= 1, "pieces of the cache aside, which read three tables in all"

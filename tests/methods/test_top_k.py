"""Choosing exactly k entries of several tensors: a selection, or counting where they are many."""

import pytest
import torch
from torch import Tensor

from luthier.methods.parts import masks


def by_sorting(scores: list[Tensor], k: int) -> list[Tensor]:
    flat = torch.cat([s.flatten().float() for s in scores])
    chosen = torch.zeros(len(flat), dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:k]] = True
    return [part.view(s.shape) for part, s in zip(chosen.split([s.numel() for s in scores]), scores, strict=True)]


def drawn(kind: str) -> list[Tensor]:
    torch.manual_seed(0)
    found = [torch.randn(40, 25), torch.randn(7), torch.randn(3, 5, 11)]
    changed = {
        "any": lambda s: s,
        "squares": lambda s: s * s * 1e-20,
        "below the least normal number": lambda s: s * 1e-41,
        "zeros of both signs": lambda s: torch.where(torch.rand(s.shape) < 0.5, torch.full_like(s, -0.0), s.relu()),
        "few values": lambda s: (2 * s).round(),
        "negative": lambda s: -s.abs(),
        "bf16": lambda s: s.bfloat16(),
        "infinite": lambda s: torch.where(s > 1, torch.inf, s),
    }[kind]
    return [changed(s) for s in found]


KINDS = ("any", "squares", "below the least normal number", "zeros of both signs", "few values", "negative", "bf16")


@pytest.mark.parametrize("kind", [*KINDS, "infinite"])
@pytest.mark.parametrize("counted", [True, False])
def test_exactly_k_are_taken_and_equal_scores_in_their_order(kind, counted, monkeypatch):
    monkeypatch.setattr(masks, "_LARGE", 0 if counted else 2**20)
    monkeypatch.setattr(masks, "_PIECE", 64)  # pieces end within tensors
    scores = drawn(kind)
    total = sum(s.numel() for s in scores)
    for k in (0, 1, 2, 100, total // 2, total - 1, total, total + 5):
        found = masks.top_k(scores, k)
        assert sum(int(m.sum()) for m in found) == min(k, total)
        assert all(torch.equal(one, other) for one, other in zip(found, by_sorting(scores, k), strict=True)), k


def test_many_scores_are_counted_without_a_copy_of_them(monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a selection of the library holds 16 bytes beside each number")

    scores = [torch.randn(2**20), torch.randn(5)]
    wanted = by_sorting(scores, 1000)
    monkeypatch.setattr(torch, "topk", never)
    monkeypatch.setattr(torch, "cat", never)
    assert all(torch.equal(one, other) for one, other in zip(masks.top_k(scores, 1000), wanted, strict=True))

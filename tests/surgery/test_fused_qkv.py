"""Queries, keys and values as one product: they are what each gives alone, and only where they read one tensor."""

from typing import Any

import pytest
import torch
from cells import shake
from tiny import inputs, tiny
from torch import Tensor, nn

from luthier import kernels
from luthier.surgery import Tuned, attach
from luthier.surgery.fused_qkv import FEW, FusedQKV, qkv_paths
from luthier.surgery.socket import Socket

ARCHES = ("bert", "gpt2", "llama", "opt", "t5", "bart", "vit", "modernbert", "gpt-neox", "distilbert")


def ready(arch: str, method: str = "lora", dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Tuned, Any]:
    """A tiny model as `Predictor` prepares one, with every trained number moved off its start."""
    tuned = attach(
        tiny(arch, "classification" if arch in ("bert", "vit", "modernbert", "distilbert") else ""), method, **settings
    )
    shake(tuned)
    tuned.model.to(dtype).eval()
    tuned.fast.accelerate(training=False)
    batch = {
        k: v for k, v in inputs(tuned.model, batch=1).items() if k != "labels" or tuned.model.config.is_encoder_decoder
    }
    return tuned, batch


def counted(patch: pytest.MonkeyPatch) -> list[bool]:
    """Every time a projection asks its siblings: whether they had an answer."""
    inner, found = FusedQKV.give, []

    def give(self: FusedQKV, number: int, x: Tensor) -> Tensor | None:
        out = inner(self, number, x)
        found.append(out is not None)
        return out

    patch.setattr(FusedQKV, "give", give)
    return found


def logits(tuned: Tuned, batch: Any) -> Tensor:
    with torch.no_grad():
        return tuned.model(**batch).logits


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize("method", ["lora", "ia3", "dora", "sequential_adapter"])
def test_an_answer_is_what_it_is_without_them(arch: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = ready(arch, method)
    expected = logits(tuned, batch)
    asked = counted(monkeypatch)
    with tuned.serving():
        for _ in range(3):
            torch.testing.assert_close(logits(tuned, batch), expected, rtol=0, atol=1e-10)
        fused = not list(qkv_paths(tuned.anatomy))
        if method in ("lora", "sequential_adapter") and not fused:
            assert asked and all(asked)
        if method in ("ia3", "dora"):
            assert not any(asked)
        with kernels.plain():  # norms are computed in fp32 in other steps
            torch.testing.assert_close(logits(tuned, batch), expected, rtol=0, atol=1e-5)


def test_a_fused_projection_has_none_and_separate_ones_have_three() -> None:
    assert not list(qkv_paths(ready("gpt2")[0].anatomy))
    tuned, _ = ready("llama")
    paths = list(qkv_paths(tuned.anatomy))
    assert len(paths) == tuned.anatomy.n_layers
    assert [p.rsplit(".", 1)[1] for p in paths[0]] == ["q_proj", "k_proj", "v_proj"]


def test_many_tokens_are_computed_the_usual_way(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = ready("bert")
    asked = counted(monkeypatch)
    many = {k: v.repeat(FEW // v.shape[1] + 1, 1) for k, v in batch.items()}
    with tuned.serving():
        logits(tuned, many)
        assert not asked
        logits(tuned, batch)
    assert asked


def test_other_tunings_are_seen_and_so_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = ready("llama")
    tuned.add("lora", name="b", seed=1)
    tuned.activate("b")
    shake(tuned, 0.3)
    tuned.model.double().eval()
    asked = counted(monkeypatch)
    expected = {}
    for names in ((), ("default",), ("b",)):
        tuned.activate(*names)
        expected[names] = logits(tuned, batch)
    with tuned.serving():
        for names in ((), ("default",), ("b",), ("default",)):
            tuned.activate(*names)
            torch.testing.assert_close(logits(tuned, batch), expected[names], rtol=0, atol=1e-10)
    assert asked and all(asked)
    assert not torch.equal(expected["b",], expected["default",])


def test_a_layer_that_somebody_listens_to_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = ready("bert")
    expected, heard = logits(tuned, batch), []
    path = next(qkv_paths(tuned.anatomy))[1]
    layer = tuned.edited.modules[path]
    with tuned.serving():
        logits(tuned, batch)
        handle = layer.register_forward_hook(lambda *_: heard.append(1))
        torch.testing.assert_close(logits(tuned, batch), expected, rtol=0, atol=1e-10)
        handle.remove()
    assert heard == [1]


def test_with_a_gradient_wanted_they_stay_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch = ready("bert")
    asked = counted(monkeypatch)
    with tuned.serving(), torch.enable_grad():
        tuned.model(**batch)
    assert not asked


def plain_group(n: int = 3) -> tuple[FusedQKV, list[nn.Linear]]:
    layers = [nn.Linear(6, 4 + i).double() for i in range(n)]
    return FusedQKV([Socket(layer) for layer in layers]), layers


@torch.no_grad()
def test_whoever_reads_another_tensor_ends_it_for_all() -> None:
    group, layers = plain_group()
    x, other = torch.randn(2, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    first = group.give(0, x)
    assert first is not None and torch.allclose(first, layers[0](x))
    assert group.give(1, other) is None  # computed by itself, from what it reads
    assert group.give(2, x) is None and group.give(0, x) is None
    group.refresh()
    assert group.give(0, x) is not None


@torch.no_grad()
def test_an_equal_tensor_is_not_the_same_one() -> None:
    group, _ = plain_group()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert group.give(0, x) is not None
    assert group.give(1, x.clone()) is None


@torch.no_grad()
def test_a_tensor_that_is_written_to_between_two_projections_is_found_out() -> None:
    group, _ = plain_group()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert group.give(0, x) is not None
    x += 1
    assert group.give(1, x) is None and group.give(2, x) is None


@torch.no_grad()
def test_asked_twice_for_one_tensor_it_does_not_give_what_was_taken() -> None:
    group, _ = plain_group()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert group.give(0, x) is not None
    assert group.give(0, x) is None


@torch.no_grad()
def test_what_waits_is_taken_for_this_very_tensor_and_once_it_was_compared() -> None:
    group, layers = plain_group()
    x = torch.randn(2, 6, dtype=torch.float64)
    assert group.take(0, x) is None and group.give(0, x) is not None
    assert group.take(1, x) is None  # not compared with the usual way yet
    assert group.give(1, x) is not None and group.give(2, x) is not None
    assert group.give(0, x) is not None
    assert group.take(1, x.clone()) is None
    for number in (2, 1):
        out = group.take(number, x)
        assert out is not None and torch.allclose(out, layers[number](x))
    assert group.take(1, x) is None and group._waiting is None


@torch.no_grad()
def test_nothing_is_kept_when_all_have_taken_theirs_in_any_order() -> None:
    group, layers = plain_group()
    for order in ((0, 1, 2), (2, 0, 1)):
        x = torch.randn(3, 6, dtype=torch.float64)
        for number in order:
            out = group.give(number, x)
            assert out is not None and torch.allclose(out, layers[number](x))
        assert group._waiting is None


@torch.no_grad()
def test_layers_of_different_types_are_not_joined() -> None:
    layers = [nn.Linear(6, 4), nn.Linear(6, 4).double(), nn.Linear(6, 4)]
    assert FusedQKV([Socket(layer) for layer in layers]).give(0, torch.randn(2, 6)) is None


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_copies_of_projections_end_where_their_budget_ends(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, _ = ready("bert")
    with tuned.serving():
        assert tuned._serving._routes is not None
        sizes = [group.n_bytes for group in tuned._serving._routes.qkv]
    assert len(sizes) == 3
    monkeypatch.setattr("luthier.surgery.serving.BUDGET_BYTES", sum(sizes[:blocks]))
    with tuned.serving():
        assert tuned._serving._routes is not None and len(tuned._serving._routes.qkv) == blocks

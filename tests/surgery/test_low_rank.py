"""Any change of weights as LoRA: exact where it is one, the nearest where it is not, and nothing dropped unsaid."""

import pytest
import torch
from tiny import inputs, tiny

from luthier.core import CannotMerge, NothingTrains
from luthier.surgery import attach
from luthier.surgery.low_rank import as_lora, thin
from luthier.surgery.merging import probe


def moved(model: torch.nn.Module, method: str, **settings: object) -> object:
    tuned = attach(model, method, **settings)  # type: ignore[arg-type]
    with torch.no_grad():
        for number, parameter in enumerate(tuned.trained().values()):
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.1 * draw)
    model.eval()
    return tuned


def test_the_nearest_product_is_that_of_singular_values_and_its_share_is_counted() -> None:
    change = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(change)
    for rank in (1, 3, 5, 9):
        b, a, kept, whole = thin(change, rank, 0.0)
        r = min(rank, 5)
        assert a.shape == (r, 5) and b.shape == (7, r)
        off = (change - b @ a).square().sum()
        assert float(off) == pytest.approx(float(values[r:].square().sum()), abs=1e-5)
        assert kept == pytest.approx(float(values[:r].square().sum() / values.square().sum()), abs=1e-6)
        assert whole == (r == 5)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])  # gpt2 stores its weights the other way round
def test_what_is_a_lora_becomes_one_with_the_same_answers(kind: str) -> None:
    model = tiny(kind, "classification")
    batch = inputs(model)
    tuned = moved(model, "adalora" if kind == "bert" else "lora", sites=("ffn.up", "attn.o"))
    wanted = probe(model, batch)
    with tuned.base_only():  # type: ignore[attr-defined]
        base = probe(model, batch)
    fresh, low = as_lora(tuned)  # type: ignore[arg-type]
    assert low.exact and not low.left_out and low.kept > 1 - 1e-6
    found = probe(model, batch)
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found, base, atol=1e-2)
    assert fresh.tuning().method.is_a("lora")


def test_what_is_none_is_refused_without_a_rank_and_comes_nearer_with_each() -> None:
    off = []
    for rank in (1, 8, 40):
        model = tiny("bert", "classification")
        batch = inputs(model)
        tuned = moved(model, "dora", rank=4)
        wanted = probe(model, batch)
        if rank == 1:
            with pytest.raises(CannotMerge, match=r"attn\.q@0: its change is of a rank above 24; rank \d+ keeps 99 %"):
                as_lora(tuned)  # type: ignore[arg-type]
            assert torch.equal(probe(model, batch), wanted), "nothing has changed"
        _, low = as_lora(tuned, rank)  # type: ignore[arg-type]
        assert not low.exact or rank == 40
        off.append(float((probe(model, batch) - wanted).square().mean()))
    assert off[0] > off[1] > off[2]


def test_without_a_rank_a_lora_beside_what_none_holds_is_refused_and_nothing_has_changed() -> None:
    model = tiny("bert", "classification")
    tuned = moved(model, "lora+bitfit")
    wanted = probe(model, inputs(model))
    with pytest.raises(CannotMerge, match=r"it changes .*bias, \.\.\. too, which no LoRA holds"):
        as_lora(tuned)  # type: ignore[arg-type]
    assert torch.equal(probe(model, inputs(model)), wanted)
    assert as_lora(tuned, 8)[1].left_out


def test_what_no_lora_holds_is_named_with_its_share_and_heads_stay() -> None:
    model = tiny("bert", "classification")
    batch = inputs(model)
    tuned = moved(model, "full")
    head = dict(model.named_parameters())["classifier.weight"].detach().clone()
    fresh, low = as_lora(tuned, 48)  # type: ignore[arg-type]
    names = [name for name, _ in low.left_out]
    assert any("LayerNorm" in name for name in names) and any("word_embeddings" in name for name in names)
    assert any(name.endswith("query.bias") for name in names) and not any("classifier" in name for name in names)
    assert all(0 < share < 1 for _, share in low.left_out) and not low.exact
    assert torch.equal(fresh.edited.parameters["classifier.weight"], head)
    assert probe(model, batch).isfinite().all()


def test_a_tuning_without_weights_or_without_a_change_is_refused() -> None:
    tuned = moved(tiny("bert", "classification"), "bitfit")
    with pytest.raises(CannotMerge, match="none of what the tuning changes is a linear layer"):
        as_lora(tuned, 4)  # type: ignore[arg-type]
    with pytest.raises(CannotMerge, match="cannot be merged"):
        as_lora(moved(tiny("bert", "classification"), "prompt_tuning"), 4)  # type: ignore[arg-type]
    with pytest.raises(NothingTrains):
        as_lora(attach(tiny("bert", "base"), "lora"), 4)

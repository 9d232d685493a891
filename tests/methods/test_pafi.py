"""PaFi: its own tests, beside those that every method passes."""

import json
import math
from pathlib import Path

import pytest
import torch
from methods.checks import logits, stir
from methods.sizes import anatomy_of, trained
from tiny import tiny

from luthier.core import IntegrityError
from luthier.methods.parts.update_masks import maskable
from luthier.surgery import attach, load
from luthier.surgery.tuning_files import stored_tensors


def masks(seed=0, model=None, **settings):
    tuned = attach(tiny("bert") if model is None else model, "pafi", seed=seed, **settings)
    return tuned, {k: u for k, u in tuned.tuning().unfrozen.items() if k.startswith("model/")}


def test_counts_are_those_of_the_catalogue():
    assert trained("bert", "pafi", scope="model", over="all") == 547_411
    anatomy = anatomy_of("bert")
    names = maskable(anatomy, "matrices")
    assert sum(math.prod(anatomy.tensors[n]) for n in names) == 84_934_656
    assert trained("bert", "pafi") == sum(math.floor(0.005 * math.prod(anatomy.tensors[n])) for n in names)


@pytest.mark.acid("pafi", 1)
def test_no_seed_and_no_data_change_the_mask():
    one, other = masks(seed=0)[1], masks(seed=5)[1]
    assert all(torch.equal(one[k].mask, other[k].mask) for k in one)
    assert not masks()[0].tuning().method.looks_at_data


@pytest.mark.acid("pafi", 2)
@pytest.mark.parametrize("scope", ["tensor", "model"])
def test_the_smallest_values_are_chosen(scope):
    _, found = masks(share=0.05, scope=scope)
    inside = [u.original.bfloat16().abs()[u.mask] for u in found.values()]
    outside = [u.original.bfloat16().abs()[~u.mask] for u in found.values()]
    if scope == "tensor":
        assert all(i.max() <= o.min() for i, o in zip(inside, outside, strict=True))
    else:
        assert torch.cat(inside).max() <= torch.cat(outside).min()


@pytest.mark.acid("pafi", 4)
def test_a_padding_row_is_not_chosen():
    model = tiny("bert")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[0].zero_()
    _, found = masks(model=model, share=0.05, over="all", scope="model")
    mask = found["model/bert.embeddings.word_embeddings.weight"].mask
    assert mask.any() and not mask[0].any()


@pytest.mark.acid("pafi", 3)
def test_a_file_holds_values_without_places(tmp_path):
    tuned, found = masks(share=0.05)
    stir(tuned, 0.1)
    tuned.state.constrain()
    held = {n: t for n, t in stored_tensors(tuned.tuning()).items() if n.startswith("model/")}
    assert {n.partition("|")[2] for n in held} == {"values", "places"}
    assert sum(t.numel() for t in held.values()) == tuned.tuning().method.n_stored(tuned.anatomy)
    tuned.save(tmp_path / "tuning")
    for dtype in (torch.float32, torch.bfloat16):  # the entries are the same in both
        again = tiny("bert").to(dtype)
        loaded = load(again, tmp_path / "tuning").tuning().unfrozen
        assert all(torch.equal(loaded[k].mask, u.mask) for k, u in found.items())
        if dtype == torch.float32:
            assert torch.equal(logits(again), logits(tuned.model))


def test_places_that_are_others_than_when_it_was_saved_are_refused(tmp_path: Path, monkeypatch):
    tuned, _ = masks(share=0.05)
    tuned.save(tmp_path / "tuning")
    monkeypatch.setattr("luthier.methods.partial.pafi._smallness", lambda value, embedding: value.float())
    model = tiny("bert")
    with pytest.raises(IntegrityError, match="precision it was trained in"):
        load(model, tmp_path / "tuning")
    assert json.loads((tmp_path / "tuning" / "tuning.json").read_text())["method"] == "pafi"
    assert list(model.state_dict()) == list(tiny("bert").state_dict())

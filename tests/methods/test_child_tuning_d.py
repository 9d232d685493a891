"""Child-Tuning_D: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from methods.checks import logits, train
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.partial.child_tuning_d import ChildTuningD
from luthier.surgery import attach, load


def _batches(model, *seeds):
    return [lambda seed=seed: model(**inputs(model, seed=seed)).loss for seed in seeds]


def _prepared(name="bert", method=None, seeds=(1, 2)):
    method = method or ChildTuningD()
    model = tiny(name)
    tuned = attach(model, method)
    method.prepare(tuned, _batches(model, *seeds))
    return tuned, method


def _masks(tuned):
    return {k: u.mask for k, u in tuned.tuning().unfrozen.items() if u.mask is not None}


def _outside_moved(tuned):
    moved = 0
    for unfrozen in tuned.tuning().unfrozen.values():
        if unfrozen.mask is not None:
            moved += int((unfrozen.parameter != unfrozen.original)[~unfrozen.mask].sum())
    return moved


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_the_mask_has_exactly_its_share_of_the_blocks(name):
    tuned, method = _prepared(name)
    masks = _masks(tuned)
    size = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == math.floor(0.3 * size)
    assert tuned.n_trained() == method.n_params(tuned.anatomy)
    inside = tuple(f"model/{b.path}." for b in tuned.anatomy.blocks)
    assert set(masks) == {k for k in tuned.tuning().unfrozen if k.startswith(inside)}


def test_the_mask_is_the_top_share_of_scores_computed_apart():
    reference = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    names = [n for n, _ in reference.named_parameters() if ".layer." in n]
    scores = dict.fromkeys(names, 0.0)
    for seed in (1, 2):
        reference.zero_grad()
        reference(**inputs(reference, seed=seed)).loss.backward()
        for n, p in reference.named_parameters():
            if n in scores and p.grad is not None:
                torch.nn.utils.clip_grad_norm_([p], 1.0)
                scores[n] = scores[n] + p.grad.square() / 2
    flat = torch.cat([scores[n].flatten() for n in names])
    top = torch.zeros(len(flat), dtype=torch.bool)
    top[flat.argsort(descending=True, stable=True)[: math.floor(0.3 * len(flat))]] = True

    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0)
    method = ChildTuningD()
    tuned = attach(model, method)
    method.prepare(tuned, _batches(model, 1, 2))
    found = torch.cat([_masks(tuned)[f"model/{n}"].flatten() for n in names])
    assert (found != top).float().mean() < 1e-3  # rounding decides about a few at the edge
    assert int(found.sum()) == int(top.sum())
    magnitude = torch.cat([dict(reference.named_parameters())[n].detach().abs().flatten() for n in names])
    assert (found != (magnitude >= magnitude.sort(descending=True).values[int(top.sum()) - 1])).float().mean() > 0.1


def test_scoring_leaves_no_trace():
    model, method = tiny("bert"), ChildTuningD()
    tuned = attach(model, method)
    held = next(iter(tuned.trained().values()))
    held.grad = torch.ones_like(held)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = {n: m.training for n, m in model.named_modules()}
    generator = torch.get_rng_state()
    method.prepare(tuned, _batches(model, 1))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(held.grad, torch.ones_like(held))
    assert all(p.grad is None for p in tuned.trained().values() if p is not held)


def test_same_data_same_mask_and_other_data_another():
    first, again, other = (_masks(_prepared(seeds=s)[0]) for s in ((1, 2), (1, 2), (7, 8)))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert any(not torch.equal(first[k], other[k]) for k in first)


def test_entries_outside_the_mask_stay_bit_for_bit_under_decay_and_momentum():
    tuned, _ = _prepared()
    train(tuned, 6, decay=0.1)
    assert _outside_moved(tuned) == 0
    assert all(
        bool((u.parameter != u.original).any())
        for u in tuned.tuning().unfrozen.values()
        if u.mask is None or u.mask.any()
    )


@pytest.mark.parametrize(("decay", "moves"), [(0.0, False), (0.1, True)])
def test_without_masked_decay_only_decay_moves_the_rest_as_in_the_authors_code(decay, moves):
    tuned, _ = _prepared(method=ChildTuningD(masked_decay=False))
    train(tuned, 4, decay=decay)
    assert (_outside_moved(tuned) > 0) == moves


def test_embeddings_and_head_train_whole():
    tuned, _ = _prepared()
    for key, unfrozen in tuned.tuning().unfrozen.items():
        if "embeddings" in key or key.startswith("head/") or "pooler" in key:
            assert unfrozen.mask is None


@pytest.mark.parametrize("masked", [True, False])
def test_a_saved_child_computes_the_same_bits(masked, tmp_path):
    tuned, method = _prepared(method=ChildTuningD(masked_decay=masked))
    train(tuned, 3, decay=0.1)
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(tuned.model))
    from luthier.surgery.tuning_files import stored_tensors

    stored = sum(t.numel() for n, t in stored_tensors(tuned.tuning()).items() if not n.startswith("head/"))
    assert stored == method.n_stored(tuned.anatomy)


def test_a_planted_signal_is_found():
    model, method = tiny("bert"), ChildTuningD(share=0.01)
    tuned = attach(model, method)
    planted = model.bert.encoder.layer[1].output.dense.weight
    method.prepare(tuned, [lambda: (planted[:5] ** 2).sum() + 0.0 * planted.sum()])
    masks = _masks(tuned)
    rest = {k: int(m.sum()) for k, m in masks.items() if not k.endswith("layer.1.output.dense.weight")}
    mask = masks["model/bert.encoder.layer.1.output.dense.weight"]
    assert mask[:5].all()
    assert int(mask.sum()) + sum(rest.values()) == math.floor(0.01 * sum(m.numel() for m in masks.values()))


def test_training_without_prepare_is_refused():
    tuned = attach(tiny("bert"), ChildTuningD())
    with pytest.raises(ConfigError, match="mask was never chosen"):
        train(tuned, 1)


def test_it_does_not_stand_beside_full_training():
    assert ChildTuningD().conflicts(attach(tiny("bert"), "bitfit").tuning().method)

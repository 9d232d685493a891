"""Child-Tuning_D: its own tests, beside those that every method passes."""

import math

import pytest
import torch
from little import Heard, little_data, little_model, little_spec
from methods.checks import logits, train
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import ConfigError
from luthier.methods.partial.child_tuning_d import ChildTuningD
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import BatchSpec
from luthier.surgery import Look, attach, gradients, load


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


@pytest.mark.acid("child_tuning_d", 2)
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


def _seeded(model, seed):
    """A mini-batch's loss whose dropout is named by the mini-batch."""

    def loss():
        torch.manual_seed(seed)
        return model(**inputs(model, seed=seed)).loss

    return loss


def test_scores_are_those_of_training_mode():
    reference = tiny("bert").train()
    named = {n: p for n, p in reference.named_parameters() if ".layer." in n}
    scores = dict.fromkeys(named, 0.0)
    for seed in (1, 2):
        for (n, p), grad in zip(
            named.items(), torch.autograd.grad(_seeded(reference, seed)(), list(named.values())), strict=True
        ):
            assert p.shape == grad.shape
            scores[n] = scores[n] + (grad * min(1.0, 1 / (float(grad.norm()) + 1e-6))).square()
    flat = torch.cat([scores[n].flatten() for n in named])
    wanted = torch.zeros(len(flat), dtype=torch.bool)
    wanted[flat.argsort(descending=True, stable=True)[: math.floor(0.3 * len(flat))]] = True

    model, method = tiny("bert"), ChildTuningD()
    tuned = attach(model, method)
    method.prepare(tuned, [_seeded(model, seed) for seed in (1, 2)])
    found = torch.cat([_masks(tuned)[f"model/{n}"].flatten() for n in named])
    assert (found != wanted).float().mean() < 1e-3
    model.eval()
    still = attach(tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0), method, name="still")
    method.prepare(still, [_seeded(still.model, seed) for seed in (1, 2)])
    other = torch.cat([_masks(still)[f"model/{n}"].flatten() for n in named])
    assert (found != other).float().mean() > 0.02, "dropout is seen in the mask"


def test_a_step_is_squared_once_however_it_is_cut():
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0).double()
    tuned = attach(model, ChildTuningD())
    batch = inputs(model, batch=6, padded=False)

    def part(rows):
        return lambda: model(**{k: v[rows] for k, v in batch.items()}).loss * len(rows) / 6

    parameters = list(tuned.trained().values())
    whole = gradients(lambda: model(**batch).loss, parameters)
    for cuts in ([[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [4, 2, 1]]):
        look = Look([part(rows) for rows in cuts])
        for one, other in zip(gradients(look, parameters), whole, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(look(), model(**batch).loss)


def test_the_mask_of_a_run_does_not_depend_on_how_memory_cuts_a_step(tmp_path):
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}
    masks = []
    for name, cut in {"pieces": BatchSpec(size=8, tokens=32, accumulate=4), "whole": BatchSpec(size=8)}.items():
        home = tmp_path / name
        little_model(home / "bert", "bert", **still)
        spec = little_spec(home, "child_tuning_d", batch=cut)
        run(spec, stop_at=1)
        with RunFolder.open(home / "run") as folder:
            checkpoint, _ = load_newest(folder)
        held = checkpoint.tensors["adapter"]
        masks.append({n: t for n, t in held.items() if n.endswith("|mask")})
    one, other = (torch.cat([m.flatten() for _, m in sorted(found.items())]) for found in masks)
    assert int(one.sum()) == int(other.sum()) > 1000
    assert (one != other).float().mean() < 1e-3  # rounding decides about a few at the edge


def test_a_run_looks_at_the_whole_first_epoch(tmp_path, monkeypatch):
    seen = []
    inner = ChildTuningD.prepare

    def watched(self, tuned, batches):
        seen.append(batches)
        inner(self, tuned, batches)

    monkeypatch.setattr(ChildTuningD, "prepare", watched)
    monkeypatch.setattr("luthier.workflow.looks.SAID", 0.0)
    little_data(tmp_path / "rows.csv", rows=330)
    heard = Heard()
    spec = little_spec(tmp_path, "child_tuning_d", batch=BatchSpec(size=4), steps=1)
    run(spec, listener=heard)
    (batches,) = seen
    assert len(batches) > 64
    assert f"100% of the {len(batches)} steps of the first epoch" in heard.text
    assert f"looking at step 2 of {len(batches)}" in heard.text, "it may take longer than the run"


def test_a_share_of_the_data_is_its_first_steps():
    model = tiny("bert")
    asked = []
    batches = [lambda i=i: (asked.append(i), model(**inputs(model, seed=i)).loss)[1] for i in range(10)]
    for share, steps in ((1.0, 10), (0.3, 3), (0.01, 1)):
        asked.clear()
        method = ChildTuningD(data=share)
        method.prepare(_fresh(model, method), batches)
        assert asked == list(range(steps))


def _fresh(model, method):
    from luthier.surgery import Tuned

    held = Tuned.of(model)
    if held is not None:
        held.detach()
    return attach(model, method)


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


@pytest.mark.acid("child_tuning_d", 1)
def test_entries_outside_the_mask_stay_bit_for_bit_under_decay_and_momentum():
    tuned, _ = _prepared()
    train(tuned, 6, decay=0.1)
    assert _outside_moved(tuned) == 0
    assert all(
        bool((u.parameter != u.original).any())
        for u in tuned.tuning().unfrozen.values()
        if u.mask is None or u.mask.any()
    )


@pytest.mark.acid("child_tuning_d", 1)
@pytest.mark.parametrize(("decay", "moves"), [(0.0, False), (0.1, True)])
def test_without_masked_decay_only_decay_moves_the_rest_as_in_the_authors_code(decay, moves):
    tuned, _ = _prepared(method=ChildTuningD(masked_decay=False))
    train(tuned, 4, decay=decay)
    assert (_outside_moved(tuned) > 0) == moves


@pytest.mark.acid("child_tuning_d", 3)
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


@pytest.mark.parametrize(("share", "words"), [(0.0, "keeps none"), (1.0, "keeps every number")])
def test_a_share_that_is_no_mask_is_refused_when_it_is_attached(share, words):
    with pytest.raises(ConfigError, match=words):
        attach(tiny("bert"), "child_tuning_d", share=share)

"""The second-order approximation (SAM of Fu et al.): its own tests, beside those that every method passes."""

import math

import pytest
import torch
from methods.checks import train
from methods.sizes import anatomy_of, trained
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.partial.child_tuning_d import fisher
from luthier.methods.partial.sam_sparse import gain
from luthier.methods.parts.update_masks import maskable
from luthier.surgery import attach, method

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def batches(model, *seeds):
    return [lambda seed=seed: model(**inputs(model, seed=seed)).loss for seed in seeds]


def prepared(seeds=(1, 2), **settings):
    made = method("sam_sparse", {"share": 0.1, **settings})
    tuned = attach(tiny("bert", **STILL), made)
    made.prepare(tuned, batches(tuned.model, *seeds))
    return tuned, made


def masks(tuned):
    return {k: u.mask for k, u in tuned.tuning().unfrozen.items() if k.startswith("model/")}


@pytest.mark.acid("sam_sparse", 3)
def test_each_tensor_of_the_blocks_gets_its_own_share():
    tuned, made = prepared(share=0.01)
    for key, mask in masks(tuned).items():
        assert ".layer." in key and int(mask.sum()) == math.floor(0.01 * mask.numel())
    assert made.n_params(tuned.anatomy) == tuned.n_trained() == sum(int(m.sum()) for m in masks(tuned).values())
    anatomy = anatomy_of("bert")
    sizes = [math.prod(anatomy.tensors[n]) for n in maskable(anatomy, "blocks")]
    assert sum(sizes) == 85_054_464
    assert trained("bert", "sam_sparse") == sum(math.floor(0.005 * n) for n in sizes)
    assert 425_272 - trained("bert", "sam_sparse") < len(sizes)  # what rounding in each tensor takes


@pytest.mark.acid("sam_sparse", 1)
def test_gradients_that_cancel_have_no_score_here_and_a_large_one_by_fisher():
    made = method("sam_sparse", {"share": 0.01})
    tuned = attach(tiny("bert", **STILL), made)
    planted = tuned.model.bert.encoder.layer[1].output.dense.weight
    looks = [lambda s=s: s * planted[0].sum() + 0.1 * planted[1].sum() for s in (1.0, -1.0)]
    made.prepare(tuned, looks)
    mask = masks(tuned)["model/bert.encoder.layer.1.output.dense.weight"]
    assert mask[1, : int(mask.sum())].any() and not mask[0].any()
    (by_square,) = fisher(tuned, [planted], looks, clip=1e9)
    assert by_square[0].min() > by_square[1].max()


def test_the_mask_is_the_top_of_signed_sums_computed_apart():
    tuned, _ = prepared()
    model = tiny("bert", **STILL)
    names = [k.removeprefix("model/") for k in masks(tuned)]
    for seed in (1, 2):
        model(**inputs(model, seed=seed)).loss.backward()
    for name in names:
        score = dict(model.named_parameters())[name].grad.abs().flatten()
        mask = masks(tuned)[f"model/{name}"].flatten()
        if mask.any() and not name.endswith("key.bias"):  # whose gradient is rounding alone
            assert score[mask].min() >= 0.999 * score[~mask].max()


@pytest.mark.acid("sam_sparse", 2)
def test_looking_leaves_no_trace():
    tuned, made = prepared()
    before = {n: t.clone() for n, t in tuned.model.state_dict().items()}
    generator = torch.get_rng_state()
    made.prepare(tuned, batches(tuned.model, 1))
    assert all(torch.equal(t, before[n]) for n, t in tuned.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(p.grad is None for p in tuned.trained().values())


@pytest.mark.acid("sam_sparse", 4)
def test_a_curvature_reorders_the_scores_as_the_quotient_says():
    gradient, curvature = torch.tensor([3.0, -2.0, 1.0, 0.0]), torch.tensor([9.0, 1.0, 0.1, 0.0])
    assert gain(gradient, None).argsort(descending=True).tolist() == [0, 1, 2, 3]
    assert gain(gradient, curvature).argsort(descending=True).tolist() == [2, 1, 0, 3]
    torch.testing.assert_close(gain(gradient, curvature)[:3], torch.tensor([1.0, 4.0, 10.0]), rtol=1e-4, atol=0)
    assert torch.isfinite(gain(torch.zeros(3), torch.zeros(3))).all()
    one, other = masks(prepared()[0]), masks(prepared(curvature="fisher")[0])
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_data_decide_and_only_the_first_steps_of_them():
    one, same, other = (masks(prepared(seeds=s, steps=2)[0]) for s in ((1, 2), (1, 2, 3), (7, 8)))
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert any(not torch.equal(one[k], other[k]) for k in one)


def test_nothing_outside_the_mask_moves_under_decay_and_momentum():
    tuned, _ = prepared()
    train(tuned, 4, decay=0.1)
    for key, unfrozen in tuned.tuning().unfrozen.items():
        if key.startswith("model/"):
            assert torch.equal(unfrozen.value[~unfrozen.mask], unfrozen.original[~unfrozen.mask])


def test_training_unprepared_and_without_batches_is_refused():
    made = method("sam_sparse", {})
    tuned = attach(tiny("bert"), made)
    with pytest.raises(ConfigError, match="at least one"):
        made.prepare(tuned, [])
    with pytest.raises(ConfigError, match="mask was never chosen"):
        train(tuned, 1)
    with pytest.raises(ConfigError, match="keeps none"):
        attach(tiny("bert"), "sam_sparse", share=1e-6)

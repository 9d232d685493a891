"""Intrinsic SAID: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir, train
from tiny import LAYERS, inputs, tiny

from luthier.core import ConfigError, key
from luthier.methods.parts.hadamard import Projection, hadamard
from luthier.surgery import attach, load


@pytest.mark.acid("intrinsic_said", 2)
def test_the_transform_applied_twice_is_n_times_the_identity():
    x = torch.randn(3, 64, dtype=torch.float64)
    torch.testing.assert_close(hadamard(hadamard(x)), 64 * x)


def test_the_transform_is_the_hadamard_matrix():
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    x = torch.randn(16, dtype=torch.float64)
    torch.testing.assert_close(hadamard(x), h @ x)


@pytest.mark.acid("intrinsic_said", 3)
def test_gradients_of_transform_and_projection_are_right():
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(hadamard, (x,))
    z = torch.randn(9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Projection(9, 37, 0, "a").double(), (z,))


@pytest.mark.acid("intrinsic_said", 4)
def test_the_projection_and_its_gradient_are_adjoint():
    project = Projection(20, 300, 0, "a").double()
    z = torch.randn(20, dtype=torch.float64, requires_grad=True)
    y = torch.randn(300, dtype=torch.float64)
    value = project(z) @ y
    (back,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(back @ z.detach(), value.detach())


@pytest.mark.parametrize(("inputs_", "outputs"), [(20, 300), (20, 7), (64, 64), (5, 1000)])
def test_the_projection_is_the_formula_with_its_signs_permutation_and_normal_numbers(inputs_, outputs):
    n = 2
    while n < max(inputs_, outputs):
        n *= 2
    draw = torch.Generator().manual_seed(key(3, "said", "w"))
    signs = torch.randint(2, (n,), generator=draw, dtype=torch.int8) * 2 - 1
    order = torch.randperm(n, generator=draw)
    gauss = torch.randn(n, generator=draw)
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    permute = torch.eye(n)[order]
    assert n < 4 or not torch.equal(permute, torch.eye(n))
    z = torch.randn(inputs_)
    padded = torch.cat([z, torch.zeros(n - inputs_)])
    whole = h @ torch.diag(gauss) @ permute @ h @ torch.diag(signs.float()) @ padded
    expected = whole[:outputs] / (outputs * gauss.square().sum()).sqrt()
    torch.testing.assert_close(Projection(inputs_, outputs, 3, "said", "w")(z), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.acid("intrinsic_said", 1)
@pytest.mark.parametrize("outputs", [3000, 48])
def test_the_projection_keeps_the_length_on_average(outputs):
    ratios = []
    for seed in range(40 if outputs == 3000 else 400):
        z = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        ratios.append(float((Projection(64, outputs, seed, "x").double()(z).norm() / z.norm()).square()))
    assert abs(sum(ratios) / len(ratios) - 1) < (0.02 if outputs == 3000 else 0.05)


@pytest.mark.acid("intrinsic_said", 5)
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "albert"])
@pytest.mark.parametrize("share", ["layer", "tensor", "none"])
def test_the_count_is_the_dimension(name, share):
    tuned = attach(tiny(name), "intrinsic_said", dimension=300, share=share)
    assert tuned.n_trained() == 300 == tuned.tuning().method.n_params(tuned.anatomy)


def test_one_lambda_per_block_and_one_outside():
    tuned = attach(tiny("llama"), "intrinsic_said", dimension=300)
    assert tuned.modules()["lambda"].values.numel() == LAYERS + 1


@pytest.mark.acid("intrinsic_said", 6)
def test_the_update_has_no_more_dimensions_than_z():
    tuned = attach(tiny("bert"), "intrinsic_said", dimension=12, share="none")
    moved = {k: m for k, m in tuned.modules().items() if k.startswith("tensor/") and "layer.0.attention" in k}
    # The map is linear, so its Jacobian is what it makes of the unit vectors.
    jacobian = torch.cat([torch.stack([m.projection(z) for z in torch.eye(12)], dim=1) for m in moved.values()])
    assert torch.linalg.matrix_rank(jacobian) == 12
    assert len(jacobian) > 1000


def test_updates_of_two_tensors_of_one_shape_differ():
    tuned = attach(tiny("bert"), "intrinsic_said", dimension=300)
    stir(tuned)
    query, key = (
        tuned.modules()[f"tensor/bert.encoder.layer.0.attention.self.{n}.weight"].projection(torch.ones(296))
        for n in ("query", "key")
    )
    assert abs(float(torch.nn.functional.cosine_similarity(query, key, dim=0))) < 0.1


def test_tied_weights_are_projected_once_and_stay_tied():
    model = tiny("gpt2", "lm")
    tuned = attach(model, "intrinsic_said", dimension=300)
    stir(tuned)
    assert sum("wte" in k or "lm_head" in k for k in tuned.modules()) == 1
    before = logits(model)
    tuned.merging.fold()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_only_z_and_lambda_are_stored_and_the_projection_is_made_again(tmp_path):
    model = tiny("bert")
    tuned = attach(model, "intrinsic_said", dimension=300, subspace=7, seed=3)
    train(tuned, 3)
    tuned.finish()
    tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    found = load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(model))
    stored = {n for k, m in found.modules().items() for n in m.state_dict() if not k.startswith("head/")}
    assert stored == {"z", "values"}


def test_two_subspaces_differ():
    found = []
    for subspace in (0, 1):
        tuned = attach(tiny("bert"), "intrinsic_said", dimension=300, subspace=subspace)
        with torch.no_grad():
            tuned.modules()["subspace"].z.fill_(0.1)
        found.append(logits(tuned.model))
    assert not torch.allclose(found[0], found[1])


def test_training_lowers_the_loss_and_moves_z_and_lambda():
    tuned = attach(
        tiny("bert"),
        "intrinsic_said",
        dimension=300,
    )
    losses = train(tuned, 25, lr=3e-2, decay=0.0)
    assert losses[-1] < losses[0]
    assert torch.count_nonzero(tuned.modules()["subspace"].z) == 296
    assert (tuned.modules()["lambda"].values != 1).all()


def test_lambda_decays_towards_one():
    tuned = attach(tiny("bert"), "intrinsic_said", dimension=300)
    assert [(g.names, g.decay_to) for g in tuned.groups()] == [(("lambda.values",), 1.0)]


def test_a_dimension_without_room_for_lambdas_is_refused():
    with pytest.raises(ConfigError, match="leaves nothing beside the 4 lambdas"):
        attach(tiny("bert"), "intrinsic_said", dimension=4)


def test_no_frozen_weight_gets_a_gradient():
    tuned = attach(tiny("bert"), "intrinsic_said", dimension=300, train_head=False)
    tuned.model(**inputs(tuned.model)).loss.backward()
    touched = {n for n, p in tuned.model.named_parameters() if p.grad is not None}
    assert all("luthier" in n for n in touched)
    assert len(touched) == 2

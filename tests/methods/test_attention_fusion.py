"""Attention fusion: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir
from methods.sizes import trained
from tiny import inputs, tiny

from luthier.core import AnatomyError
from luthier.methods.additive.attention_fusion import Fusion
from luthier.surgery import attach

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0}


def fused(name="bert", task="classification", **settings):
    tuned = attach(tiny(name, task), "attention_fusion", **settings)
    return tuned, next(iter(tuned.modules(Fusion).values()))


def states_of(model, batch, *, embeddings=False):
    """What the layers say of each token, computed apart: (batch, tokens, layers, d)."""
    model.eval()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    return torch.stack(states[0 if embeddings else 1 :], dim=-2)


def test_the_query_is_all_that_trains_beside_the_head():
    assert trained("bert-for-two", "attention_fusion") == 768
    tuned, _ = fused()
    assert tuned.n_trained() == 48
    assert {n.partition("/")[0] for n in tuned.trained()} == {"head", "branch.query"}


@pytest.mark.acid("attention_fusion", 1)
@pytest.mark.parametrize("settings", [{}, {"embeddings": True}, {"scaled": True}])
def test_weights_depend_on_the_token_and_sum_to_one_over_the_layers(settings):
    tuned, fusion = fused(**settings)
    stir(tuned, 1.0)
    states = states_of(tiny("bert", "classification"), inputs(tuned.model), embeddings="embeddings" in settings)
    weights = fusion.weights(states)
    assert weights.shape == (*states.shape[:2], 4 if "embeddings" in settings else 3)
    torch.testing.assert_close(weights.sum(-1), torch.ones(states.shape[:2]))
    assert (weights[0, 0] - weights[0, 1]).abs().max() > 1e-3


@pytest.mark.acid("attention_fusion", 2)
def test_no_state_of_the_model_has_a_graph():
    tuned, fusion = fused()
    seen = []
    handle = fusion.register_forward_pre_hook(lambda m, args: seen.extend(c.after for c in args[1]))
    tuned.model(**inputs(tuned.model)).loss.backward()
    handle.remove()
    assert len(seen) == 3 and all(s.grad_fn is None for s in seen)
    named = tuned.model.named_parameters()
    assert not [n for n, p in named if p.grad is not None and not n.startswith(("luthier", "classifier"))]


@pytest.mark.acid("attention_fusion", 2)
def test_from_kept_features_the_query_gets_the_same_gradient():
    tuned, fusion = fused("bert", "tokens")
    stir(tuned, 0.5)
    tuned.model.eval()
    batch = inputs(tuned.model)
    tuned.model(**batch).loss.backward()
    found, fusion.query.grad = fusion.query.grad.clone(), None
    states = states_of(tiny("bert", "tokens"), batch)
    out = tuned.model.classifier(fusion.fuse(states))
    torch.nn.functional.cross_entropy(out.flatten(0, 1), batch["labels"].flatten()).backward()
    torch.testing.assert_close(fusion.query.grad, found, atol=1e-7, rtol=1e-5)


@pytest.mark.acid("attention_fusion", 3)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
def test_a_query_of_zeros_is_the_mean_of_the_layers_and_one_layer_alone_is_the_base(name):
    tuned, fusion = fused(name)
    with torch.no_grad():
        states = torch.randn(2, 5, 3, 48)
        torch.testing.assert_close(fusion.fuse(states), states.mean(-2))
    base = logits(tiny(name, "classification"))
    fusion.weights = lambda states: torch.eye(states.shape[-2])[-1].expand(states.shape[:-1])
    torch.testing.assert_close(logits(tuned.model), base, atol=1e-5, rtol=1e-5)


def test_a_model_without_a_new_head_is_refused():
    with pytest.raises(AnatomyError, match="no new task head"):
        attach(tiny("gpt2"), "attention_fusion")

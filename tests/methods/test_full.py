"""Full fine-tuning and the linear probe: their own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import frozen_copy, logits, same, train
from tiny import inputs, tiny

from luthier.core import AnatomyError, CompositionError
from luthier.surgery import attach, method


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_full_trains_every_number_once_and_detaching_restores_them(name):
    model = tiny(name)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = attach(model, "full")
    assert tuned.n_trained(head=True) == sum(p.numel() for p in start.values())
    train(tuned, 3)
    used = [n for n, p in model.named_parameters() if not torch.equal(p, start[n])]
    assert len(used) == len(start)
    tuned.detach()
    assert same(dict(model.named_parameters()), start)


def test_full_stands_alone():
    with pytest.raises(CompositionError, match="nothing is left for the other"):
        method("full+lora")


@pytest.mark.acid("linear_probe", 2)
def test_the_probe_trains_the_head_on_features_without_a_graph():
    model = tiny("bert")
    tuned = attach(model, "head_only")
    assert tuned.n_trained() == 0
    assert {k.partition("/")[0] for k in tuned.trained()} == {"head"}
    seen = []
    handles = [m.register_forward_hook(lambda m, a, out: seen.append(out)) for m in model.bert.encoder.layer]
    model(**inputs(model)).loss.backward()
    for handle in handles:
        handle.remove()
    assert len(seen) == len(handles) > 0
    assert all((out[0] if isinstance(out, tuple) else out).grad_fn is None for out in seen)


@pytest.mark.acid("linear_probe", 1)
def test_the_probe_on_kept_features_is_the_same_probe_bit_for_bit():
    whole, kept = tiny("bert"), tiny("bert")
    for model in (whole, kept):
        attach(model, "head_only")
    with torch.no_grad():
        features = kept.bert(**{k: v for k, v in inputs(kept).items() if k != "labels"}).pooler_output
    for model in (whole, kept):
        model.eval()
        step_with = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            batch = inputs(model)
            out = model(**batch).logits if model is whole else model.classifier(features)
            torch.nn.functional.cross_entropy(out, batch["labels"]).backward()
            step_with.step()
            step_with.zero_grad()
    assert torch.equal(whole.classifier.weight, kept.classifier.weight)
    assert torch.equal(logits(whole), logits(kept))


def test_the_pooler_trains_only_when_asked():
    tuned = attach(tiny("bert"), "head_only", pooler=True)
    assert {k for k in tuned.trained() if k.startswith("model/")} == {
        "model/bert.pooler.dense.weight",
        "model/bert.pooler.dense.bias",
    }
    probe = attach(tiny("bert"), "head_only")
    before = frozen_copy(probe)
    train(probe, 3)
    assert any("pooler" in n for n in before)
    assert same(dict(probe.model.named_parameters()), before)
    with pytest.raises(AnatomyError, match="no pooler"):
        attach(tiny("distilbert"), "head_only", pooler=True)


def test_a_language_model_has_nothing_to_probe():
    with pytest.raises(AnatomyError, match="no new task head"):
        attach(tiny("gpt2"), "head_only")

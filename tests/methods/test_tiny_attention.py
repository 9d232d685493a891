"""Tiny attention: the acid tests of its paper, beside those that every method passes."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import transformers as hf
from little import little_spec
from methods.checks import counted, logits, stir
from methods.generation import check_generation
from methods.sizes import anatomy_of
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import CompositionError, ModelError
from luthier.methods.additive.tiny_attention import Experts
from luthier.surgery import attach, load, method
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

ONE = {"width": 2, "experts": 1, "dropout": 0.0}


def edits(tuned, batch):
    """What the first layer's module adds: (rows, tokens, d)."""
    module = next(iter(tuned.modules(Experts).values()))
    seen, after = [], module.after

    def kept(x, y):
        out = after(x, y)
        seen.append((out - y).detach())
        return out

    module.after = kept
    logits(tuned.model, batch)
    module.after = after
    return seen[0]


def test_counts_are_those_of_the_paper():
    assert counted("tiny_attention", experts=1) == 64_644
    assert counted("tiny_attention", experts=4) == 258_576
    assert method("tiny_attention", {"experts": 1}).n_params(anatomy_of("bert-large")) == 172_296
    assert method("tiny_attention").n_stored(anatomy_of("bert-large")) == 172_296


@pytest.mark.acid("tiny_attention", 1)
@pytest.mark.parametrize("name", ["bert", "t5", "modernbert"])
def test_another_token_changes_what_a_token_is_given(name):
    tuned = attach(tiny(name, "" if name == "t5" else "tokens"), "tiny_attention", **ONE)
    stir(tuned)
    before = edits(tuned, inputs(tuned.model, padded=False))
    # Alone: the stream behind the first attention holds the other token too, so the module itself is asked.
    module = next(iter(tuned.modules(Experts).values()))
    u = torch.randn(1, 5, 48)
    moved = u.clone()
    moved[0, 4] = torch.randn(48)
    tuned.edited.context.masks, tuned.edited.context.cache = {}, None
    difference = module.experts[0](u, lambda kv: kv, module._seen) - module.experts[0](
        moved, lambda kv: kv, module._seen
    )
    assert (difference[0, :4].abs().amax(-1) > 1e-6).all() and before.abs().max() > 1e-4


@pytest.mark.acid("tiny_attention", 2)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_padded_keys_have_no_share(name, side):
    tuned = attach(tiny(name, "tokens"), "tiny_attention", **ONE)
    stir(tuned)
    batch = inputs(tuned.model, side=side)
    held = logits(tuned.model, batch)
    other = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 77))
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits(tuned.model, other)[real], held[real], rtol=0, atol=0)


@pytest.mark.acid("tiny_attention", 3)
def test_what_is_deployed_is_the_mean_of_the_experts_numbers(tmp_path):
    tuned = attach(tiny("bert"), "tiny_attention", width=2, experts=3, dropout=0.0)
    part = tuned.tuning().method
    stir(tuned)
    part.enter(tuned, 1)
    first = next(iter(tuned.modules(Experts).values()))
    apart = (first.experts[1].entry.weight - first.experts[0].entry.weight).abs().max()
    assert 0 < apart < 1e-5, "clones with small noise"
    assert torch.equal(first.experts[1].exit.weight, first.experts[0].exit.weight)
    stir(tuned)
    each = [{n: t.clone() for n, t in e.state_dict().items()} for e in first.experts]
    tuned.finish()
    for n, t in first.experts[0].state_dict().items():
        torch.testing.assert_close(t, torch.stack([e[n] for e in each]).mean(0))
    assert len(first.experts) == 1
    held = logits(tuned.model)
    tuned.save(tmp_path / "t")
    model = tiny("bert")
    load(model, tmp_path / "t")
    assert torch.equal(logits(model), held)


@pytest.mark.acid("tiny_attention", 4)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_no_token_of_a_decoder_sees_a_later_one(name):
    tuned = attach(tiny(name), "tiny_attention", **ONE)
    stir(tuned)
    batch = inputs(tuned.model, padded=False)
    read = "decoder_input_ids" if name == "t5" else "input_ids"
    given = {k: v for k, v in batch.items() if k != "labels"} | ({read: batch["labels"]} if name == "t5" else {})
    held = logits(tuned.model, given)
    later = given[read].clone()
    later[:, -1] = 99
    found = logits(tuned.model, given | {read: later})
    assert torch.equal(found[:, :-1], held[:, :-1]) and not torch.equal(found[:, -1], held[:, -1])
    check_generation(tuned, beams=2)


def test_beside_a_prompt_and_with_a_cache_filled_by_itself_alone():
    tuned = attach(tiny("llama"), "tiny_attention+prompt_tuning", **{f"tiny_attention.{n}": v for n, v in ONE.items()})
    stir(tuned)
    check_generation(tuned, beams=2)
    alone = attach(tiny("llama"), "tiny_attention", **ONE)
    stir(alone)
    ids = inputs(alone.model, padded=False)["input_ids"]
    with alone.base_only(), torch.no_grad():
        cache = alone.model(input_ids=ids, use_cache=True).past_key_values
    with torch.no_grad(), pytest.raises(ModelError, match="filled without this tuning"):
        alone.model(input_ids=ids[:, :1], past_key_values=cache)
    static = hf.StaticCache(config=alone.model.config, max_cache_len=20)
    with torch.no_grad(), pytest.raises(ModelError, match="fixed size"):
        alone.model(input_ids=ids, past_key_values=static)
    with pytest.raises(CompositionError, match="in the cache of all rows"), alone.rows(["default", None, "default"]):
        pass
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]]).expand(3, -1)
    with pytest.raises(ModelError, match="one behind the other in a row"):
        alone.model(input_ids=ids, position_ids=positions)


def test_a_cache_that_nobody_holds_is_given_up():
    tuned = attach(tiny("llama"), "tiny_attention", **ONE)
    with torch.no_grad():
        cache = tuned.model(**inputs(tuned.model), use_cache=True).past_key_values
    held = weakref.ref(cache)
    del cache
    gc.collect()
    assert held() is None


def test_a_stopped_run_goes_on_to_the_bit_in_both_parts(tmp_path):
    spec = replace(little_spec(tmp_path, "lora"), method="tiny_attention", settings={"experts": 2}, steps=8)
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (2, 4, 6):
        run(replace(spec, out=str(tmp_path / f"at-{stop}")), stop_at=stop)
        resume(tmp_path / f"at-{stop}")
        assert run_digests(tmp_path / f"at-{stop}") == run_digests(tmp_path / "whole")

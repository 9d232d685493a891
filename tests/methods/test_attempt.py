"""ATTEMPT: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, logits, stir, train
from methods.saved import saved
from tiny import inputs, tiny

from luthier.core import ConfigError
from luthier.methods.additive.attempt import Mixture
from luthier.surgery import Context, attach, open_source

SMALL = {"prompts": 2, "length": 3, "hidden": 5, "temperature": 1.0}


def mixture(tuned):
    return tuned.modules(Mixture)["prompt"]


def test_its_numbers_on_bert_base_are_those_of_the_paper():
    assert counted("attempt", length=100) == 231_936


@pytest.mark.acid("attempt", 1, 2)
def test_texts_that_differ_have_shares_that_differ_and_sum_to_one():
    tuned = attach(tiny("bert"), "attempt", **SMALL)
    stir(tuned)
    module = mixture(tuned)
    embeds = torch.randn(2, 5, 48)
    shares = module.shares(torch.cat([embeds, embeds[:1]]), None).detach()
    assert shares.shape == (3, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3))
    torch.testing.assert_close(shares[0], shares[2])
    assert (shares[0] - shares[1]).abs().max() > 1e-4


@pytest.mark.acid("attempt", 3)
def test_its_sources_stay_as_they_were_read(tmp_path):
    places = [saved(tmp_path, seed, "prompt_tuning") for seed in (0, 1)]
    held = torch.stack([open_source(place).tensors["prompt.vectors"] for place in places])
    tuned = attach(tiny("bert"), "attempt", sources=places)
    own = mixture(tuned).vectors.detach().clone()
    train(tuned, 3, decay=0.1)
    assert torch.equal(mixture(tuned).others, held)
    assert not torch.equal(mixture(tuned).vectors, own)


def test_what_spot_has_made_may_be_mixed_too(tmp_path):
    prompt = saved(tmp_path, 0, "prompt_tuning")
    tuned = attach(tiny("bert"), "spot", sources=[prompt])
    stir(tuned)
    tuned.save(tmp_path / "spot")
    mixed = mixture(attach(tiny("bert"), "attempt", sources=[prompt, tmp_path / "spot"])).others
    assert torch.equal(mixed[1], open_source(tmp_path / "spot").tensors["prompt.vectors"])
    assert not torch.equal(mixed[0], mixed[1])


@pytest.mark.acid("attempt", 4)
def test_a_great_temperature_mixes_all_alike():
    tuned = attach(tiny("bert"), "attempt", **{**SMALL, "temperature": 1e9})
    module = mixture(tuned)
    found = module.rows(Context(batch=2), torch.randn(2, 4, 48), None)
    wanted = module.vectors + torch.cat([module.others, module.vectors[None]]).mean(0)
    torch.testing.assert_close(found, wanted.expand(2, -1, -1), rtol=1e-5, atol=1e-5)


@pytest.mark.acid("attempt", 5)
def test_padding_is_not_pooled():
    tuned = attach(tiny("bert"), "attempt", **SMALL)
    stir(tuned)
    module, words = mixture(tuned), torch.randn(1, 4, 48)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    padded = torch.cat([words, torch.full((1, 2, 48), 9.0)], 1)
    torch.testing.assert_close(module.shares(padded, mask), module.shares(words, None))


@pytest.mark.parametrize("beams", [1, 2])
def test_a_generation_keeps_the_prompt_of_the_text_it_began_with(beams):
    tuned = attach(tiny("gpt2"), "attempt", **SMALL)
    stir(tuned)
    model = tuned.model.eval()
    batch = inputs(model, side="left")
    given = {k: batch[k] for k in ("input_ids", "attention_mask")}
    asked = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(**given, **asked), model.generate(**given, **asked, use_cache=False))
    assert torch.isfinite(logits(model, batch)).all()


def test_sources_that_do_not_fit_are_refused(tmp_path):
    short, long = saved(tmp_path, 0, "prompt_tuning"), saved(tmp_path, 1, "prompt_tuning", length=4)
    with pytest.raises(ConfigError, match=r"length=3 and .* with length=4"):
        attach(tiny("bert"), "attempt", sources=[short, long])
    with pytest.raises(ConfigError, match="prompts=3, and 1 sources are named"):
        attach(tiny("bert"), "attempt", sources=[short], prompts=3)
    with pytest.raises(ConfigError, match="attempt: no prompts to mix"):
        attach(tiny("bert"), "attempt")

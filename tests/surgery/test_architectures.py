"""What is attached means the same on every architecture: fused, transposed, tied, shared and 3-D weights."""

from typing import Any

import pytest
import torch
from cells import shake
from kinds import logits
from tiny import TINY, inputs, tasks, tiny

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, ModelError
from luthier.surgery import Tuned, attach, method

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3},
    "dora": {"rank": 3},
    "ia3": {},
    "bitfit": {"add_missing_biases": False},
    "lora+ia3": {"lora.rank": 3},
}
FFN = {"mixtral": "experts"}


def chosen(name: str, arch: str) -> Any:
    settings = dict(SETTINGS[name])
    inner = FFN.get(arch, "ffn")
    if "ia3" in name:
        settings["ia3.inputs" if "+" in name else "inputs"] = (f"{inner}.down",)
    if name in ("lora", "dora"):
        settings["sites"] = ("attn.q", "attn.k", "attn.v", "attn.o", inner)
    return method(name, settings)


def task(arch: str) -> str:
    return "classification" if arch in ("vit", "albert") else ""


@pytest.mark.parametrize("arch", TINY)
@pytest.mark.parametrize("name", list(SETTINGS))
def test_it_starts_at_the_base_and_merges_on_every_architecture(name: str, arch: str) -> None:
    model = tiny(arch, task(arch))
    batch = inputs(model)
    base = logits(model, batch)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    try:
        tuned = attach(model, chosen(name, arch))
    except AnatomyError as error:
        assert name == "bitfit" and "no bias to train" in str(error), str(error)
        assert list(model.state_dict()) == list(state) and Tuned.of(model) is None
        return
    torch.testing.assert_close(logits(model, batch), base, atol=1e-5, rtol=1e-5)
    shake(tuned)
    apart = logits(model, batch)
    assert float((apart - base).abs().max()) > 1e-4
    tuned.merging.fold()
    torch.testing.assert_close(logits(model, batch), apart, atol=1e-4, rtol=1e-4)
    tuned.merging.unfold()
    assert torch.equal(logits(model, batch), apart)
    model.train()
    model(**batch).loss.backward()
    without = [n for n, p in tuned.trained().items() if p.grad is None]
    assert not [n for n in without if "expert" not in n], f"no gradient reaches {without[:3]}"
    model.eval()
    tuned.detach()
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    again = attach(model, chosen(name, arch))
    shake(again)
    merged = again.merge()
    torch.testing.assert_close(logits(merged, batch), apart, atol=1e-4, rtol=1e-4)
    assert list(merged.state_dict()) == list(state)


@pytest.mark.parametrize("arch", TINY)
def test_a_prefix_goes_wherever_attention_can_be_reached_and_is_refused_elsewhere(arch: str) -> None:
    model = tiny(arch, task(arch))
    anatomy = Anatomy.read(model)
    batch = inputs(model)
    base = logits(model, batch)
    state = list(model.state_dict())
    reachable = all(a.interface for a in anatomy.attentions)
    if not reachable:
        with pytest.raises(AnatomyError, match="does not go through transformers' attention"):
            attach(model, "prefix_tuning", length=3)
        assert list(model.state_dict()) == state and Tuned.of(model) is None
        return
    tuned = attach(model, "prefix_tuning", length=3, mlp_width=0)
    assert not torch.allclose(logits(model, batch), base, atol=1e-5)
    model(**batch).loss.backward()
    for n, p in tuned.trained().items():
        assert p.grad is not None and bool(p.grad.any()), n
    tuned.detach()
    assert torch.equal(logits(model, batch), base)


TEXT = [a for a in TINY if a != "vit"]


@pytest.mark.parametrize("arch", TEXT)
def test_vectors_that_equal_words_act_as_those_words(arch: str) -> None:
    kind = "base" if "base" in tasks(arch) else ""
    model = tiny(arch, kind)
    decoder_input = {"decoder_input_ids": torch.tensor([[0, 9, 8]] * 3)} if model.config.is_encoder_decoder else {}
    real = inputs(model, padded=True)
    ids, mask = real["input_ids"], real["attention_mask"]
    words = torch.tensor([17, 23, 42])
    n = len(words)
    with torch.no_grad():
        # The same text with the words really written there: pads stay on the right.
        long_ids = torch.cat([words.expand(len(ids), -1), ids], 1)
        long_mask = torch.cat([torch.ones(len(ids), n, dtype=mask.dtype), mask], 1)
        expected = model(input_ids=long_ids, attention_mask=long_mask, **decoder_input).last_hidden_state
    prompted = attach(model, "prompt_tuning", length=n, init="words", words=tuple((int(w),) for w in words))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **decoder_input).last_hidden_state
    if decoder_input:
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
        return
    real_places = mask.bool()
    torch.testing.assert_close(found[real_places], expected[:, n:][real_places], atol=2e-5, rtol=1e-4)
    assert found.shape[1] == ids.shape[1]
    with torch.no_grad():
        unmasked = model(input_ids=ids).last_hidden_state
        prompted.activate()
        written = model(input_ids=long_ids).last_hidden_state[:, n:]
    if arch not in ("roberta", "mpnet"):  # these read their positions off the padding ids where no mask is given
        torch.testing.assert_close(unmasked, written, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("arch", ["roberta", "opt", "bert", "gpt2"])
def test_a_text_that_no_longer_fits_is_refused_with_its_numbers(arch: str) -> None:
    model = tiny(arch, "base")
    attach(model, "prompt_tuning", length=5)
    ids = torch.randint(4, 131, (1, 60))
    with pytest.raises(ModelError, match="60 tokens and 5 prompt vectors are 65 positions; the model has 64"):
        model(input_ids=ids)
    assert model(input_ids=ids[:, :59]).last_hidden_state.shape[1] == 59


def test_experts_get_an_update_of_their_own() -> None:
    model = tiny("mixtral")
    batch = inputs(model)
    tuned = attach(model, "lora", sites=("experts.up", "experts.down"), rank=2)
    assert len(tuned.modules()) == 3 * 3 * 2 and tuned.n_trained() == tuned.tuning().method.n_params(tuned.anatomy)
    base = logits(model, batch)
    with torch.no_grad():
        tuned.modules()["experts.up@1#2"].b.fill_(0.3)
    changed = logits(model, batch)
    assert not torch.equal(changed, base)
    torch.testing.assert_close(logits(tuned.merge(), batch), changed, atol=1e-5, rtol=1e-5)


def test_a_shared_block_has_one_update_for_all_its_layers() -> None:
    model = tiny("albert", "classification")
    tuned = attach(model, "lora", rank=2)
    assert len([k for k in tuned.modules() if k.startswith("attn.q")]) == 1

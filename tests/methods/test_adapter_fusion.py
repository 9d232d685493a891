"""AdapterFusion: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, logits, stir, train
from methods.saved import saved
from tiny import tiny

from luthier.core import ConfigError, WrongBase
from luthier.methods.additive.adapter_fusion import Fusion
from luthier.surgery import attach, load


@pytest.mark.acid("adapter_fusion", 4)
def test_its_numbers_on_bert_base_are_those_of_the_paper():
    assert counted("adapter_fusion") == 21_252_096


@pytest.mark.acid("adapter_fusion", 1, 2)
@pytest.mark.parametrize("times", [1, 3])
def test_one_adapter_or_several_equal_ones_give_what_that_adapter_gives(tmp_path, times, monkeypatch):
    monkeypatch.setattr("luthier.methods.additive.adapter_fusion.AdapterFusion.least_sources", 1)
    place = saved(tmp_path)
    model, other = tiny("bert"), tiny("bert")
    wanted = load(model, place)
    fused = attach(other, "adapter_fusion", sources=[place] * times)
    for name, value in wanted.tuning().unfrozen.items():  # the heads of both, alike
        fused.tuning().unfrozen[name].parameter.data.copy_(value.parameter.data)
    torch.testing.assert_close(logits(other), logits(model), rtol=0, atol=5e-5)


@pytest.mark.acid("adapter_fusion", 3)
def test_with_keys_of_zero_it_gives_the_mean_of_what_its_adapters_give(tmp_path):
    tuned = attach(tiny("bert"), "adapter_fusion", sources=[saved(tmp_path, 0), saved(tmp_path, 1)])
    fusion = tuned.modules(Fusion)["ffn_out@1"]
    torch.nn.init.zeros_(fusion.key.weight)
    torch.nn.init.eye_(fusion.value.weight)
    fusion.eval()
    x, y = torch.randn(2, 5, 48), torch.randn(2, 5, 48)
    v = fusion.norm.run(x + y)
    torch.testing.assert_close(fusion.after(x, y) - y, fusion.given(v).mean(-2), rtol=1e-4, atol=1e-5)


def test_a_token_has_shares_of_its_own_that_sum_to_one(tmp_path):
    tuned = attach(tiny("bert"), "adapter_fusion", sources=[saved(tmp_path, 0), saved(tmp_path, 1)])
    stir(tuned, 0.01)
    fusion = tuned.modules(Fusion)["ffn_out@0"].eval()
    v = torch.randn(1, 4, 48)
    shares = fusion.shares(v, fusion.given(v)).detach()
    torch.testing.assert_close(shares.sum(-1), torch.ones(1, 4))
    assert len({round(float(share), 5) for share in shares[0, :, 0]}) == 4
    # As the equation is written: keys of every adapter, unscaled.
    scores = torch.einsum("btd,btnd->btn", fusion.query(v), fusion.key(fusion.given(v)))
    torch.testing.assert_close(shares, scores.softmax(-1).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.acid("adapter_fusion", 4)
def test_its_adapters_stay_as_they_were_read(tmp_path):
    places = [saved(tmp_path, 0), saved(tmp_path, 1)]
    tuned = attach(tiny("bert"), "adapter_fusion", sources=places)
    assert tuned.n_trained() == 3 * (3 * 48**2 + 2 * 48)
    held = {f"{k}.{n}": b.clone() for k, m in tuned.modules(Fusion).items() for n, b in m.named_buffers()}
    train(tuned, 3, decay=0.1)
    now = {f"{k}.{n}": b for k, m in tuned.modules(Fusion).items() for n, b in m.named_buffers()}
    assert held.keys() == now.keys()
    assert all(torch.equal(now[n], t) for n, t in held.items())


@pytest.mark.acid("adapter_fusion", 5)
def test_a_value_off_the_identity_costs_a_hundredth_of_its_square(tmp_path):
    tuned = attach(tiny("bert"), "adapter_fusion", sources=[saved(tmp_path, 0), saved(tmp_path, 1)])
    method = tuned.tuning().method
    for fusion in tuned.modules(Fusion).values():
        torch.nn.init.eye_(fusion.value.weight)
    assert method.extra_loss(tuned) == 0
    with torch.no_grad():
        tuned.modules(Fusion)["ffn_out@2"].value.weight[3, 5] += 2.0
    torch.testing.assert_close(method.extra_loss(tuned), torch.tensor(0.04))


def test_it_loads_without_its_sources_and_says_what_it_was_made_of(tmp_path):
    first, second = saved(tmp_path, 0), saved(tmp_path, 1)
    model = tiny("bert")
    tuned = attach(model, "adapter_fusion", sources=[first, second])
    stir(tuned)
    tuned.save(tmp_path / "fused")
    for place in (first, second):
        place.rename(place.with_suffix(".gone"))
    again = tiny("bert")
    loaded = load(again, tmp_path / "fused")
    assert torch.equal(logits(again), logits(model))
    assert [s["name"] for s in loaded.tuning().sources] == ["from-0", "from-1"]
    assert all(len(s["sha256"]) == 64 for s in loaded.tuning().sources)


def test_sources_that_do_not_fit_are_refused_before_anything_is_touched(tmp_path):
    one, two = saved(tmp_path, 0), saved(tmp_path, 1)
    model = tiny("bert")
    names = list(model.state_dict())
    wide = saved(tmp_path / "wide", 2, reduction=4)
    lora = saved(tmp_path / "lora", 3, "lora", rank=2)
    other = saved(tmp_path / "other", 4, arch="roberta")
    said = {
        "at least 2; 1 given": [one],
        "reduction=8 and .* with reduction=4": [one, wide],
        "a tuning of lora, and adapter_fusion is made of saved tunings of pfeiffer_adapter": [one, two, lora],
        "no such folder": [one, tmp_path / "nowhere"],
    }
    for sentence, sources in said.items():
        with pytest.raises(ConfigError, match=sentence):
            attach(model, "adapter_fusion", sources=sources)
    with pytest.raises(WrongBase, match="model_type 'roberta' here 'bert'"):
        attach(model, "adapter_fusion", sources=[one, other])
    with pytest.raises(WrongBase, match="with weights"):
        attach(tiny("bert", seed=1), "adapter_fusion", sources=[one, two])
    with pytest.raises(ConfigError, match="adapters=3, and 2 sources"):
        attach(model, "adapter_fusion", sources=[one, two], adapters=3)
    with pytest.raises(ConfigError, match="no adapters to fuse"):
        attach(model, "adapter_fusion")
    with pytest.raises(ConfigError, match="lora takes no saved tunings"):
        attach(model, "lora", sources=[one])
    assert list(model.state_dict()) == names


def test_a_damaged_source_is_refused(tmp_path):
    one, two = saved(tmp_path, 0), saved(tmp_path, 1)
    weights = two / "tuning.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(bytes(held))
    with pytest.raises(Exception, match=str(two)) as error:
        attach(tiny("bert"), "adapter_fusion", sources=[one, two])
    assert type(error.value).__name__ == "IntegrityError"

"""SPoT: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, train
from methods.saved import saved
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.additive.spot import SPoT, similarity
from luthier.methods.parts.prompt import Prompt
from luthier.surgery import attach, open_source
from luthier.surgery.source import Source


def prompt_of(tuned):
    return tuned.modules(Prompt)["prompt"].vectors.detach()


def source(name, vectors):
    return Source(name, name, "prompt_tuning", {"length": len(vectors)}, {"prompt.vectors": vectors}, {}, "0" * 64)


def test_its_numbers_on_bert_base_are_those_of_the_paper():
    assert counted("spot", length=100) == 76_800


@pytest.mark.acid("spot", 1)
def test_it_starts_as_its_source_or_as_their_mean(tmp_path):
    places = [saved(tmp_path, seed, "prompt_tuning") for seed in (0, 1)]
    held = [open_source(place).tensors["prompt.vectors"] for place in places]
    assert torch.equal(prompt_of(attach(tiny("bert"), "spot", sources=places[:1])), held[0])
    assert torch.equal(prompt_of(attach(tiny("bert"), "spot", sources=places)), torch.stack(held).mean(0))


@pytest.mark.acid("spot", 2)
def test_its_source_does_not_change_while_it_trains(tmp_path):
    place = saved(tmp_path, 0, "prompt_tuning")
    read = open_source(place)
    before = read.tensors["prompt.vectors"].clone()
    tuned = attach(tiny("bert"), "spot", sources=[read])
    train(tuned, 2)
    assert torch.equal(read.tensors["prompt.vectors"], before)
    assert not torch.equal(prompt_of(tuned), before)


@pytest.mark.acid("spot", 3)
def test_likeness_is_symmetric_and_does_not_see_the_order_of_the_vectors():
    one, other = torch.randn(5, 8), torch.randn(7, 8)
    torch.testing.assert_close(similarity(one, other), similarity(other, one))
    torch.testing.assert_close(similarity(one, one), torch.tensor(1.0))
    torch.testing.assert_close(similarity(one, other), similarity(one[[3, 0, 4, 1, 2]], other))


@pytest.mark.acid("spot", 4)
def test_of_several_the_most_alike_is_found():
    aim, *others = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))
    twin = aim + 1e-3
    sources = [source("mine", aim), *(source(f"other-{i}", t) for i, t in enumerate(others)), source("twin", twin)]
    assert torch.equal(SPoT(early="mine", top=1).start_from(sources), twin)


def test_weights_follow_likeness():
    aim = torch.tensor([[1.0, 0.0]])
    near, far = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    sources = [source("mine", aim), source("near", near), source("far", far)]
    weights = torch.tensor([1.0, 0.5**0.5])
    weights = weights / weights.sum()
    found = SPoT(early="mine", pick="similar").start_from(sources)
    torch.testing.assert_close(found, weights[0] * near + weights[1] * far)


def test_sources_that_do_not_fit_are_refused(tmp_path):
    short, long = saved(tmp_path, 0, "prompt_tuning"), saved(tmp_path, 1, "prompt_tuning", length=4)
    with pytest.raises(ConfigError, match=r"length=3 and .* with length=4"):
        attach(tiny("bert"), "spot", sources=[short, long])
    with pytest.raises(ConfigError, match=r"no source is called 'from-9'"):
        attach(tiny("bert"), "spot", sources=[short], early="from-9")
    with pytest.raises(ConfigError, match=r"is the only source"):
        attach(tiny("bert"), "spot", sources=[short], early="from-0")
    with pytest.raises(ConfigError, match=r"top=2 needs something to compare with"):
        SPoT(top=2)
    with pytest.raises(ConfigError, match=r"spot: no prompt to start from"):
        attach(tiny("bert"), "spot")

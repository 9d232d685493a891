"""AdapterSoup: the acid tests of its paper, beside those that every method passes."""

import pytest
import torch
from methods.checks import counted, logits
from methods.saved import saved
from tiny import tiny

from luthier.core import ConfigError
from luthier.methods.parts.behind import Behind
from luthier.surgery import attach, load, open_source


def adapters(tuned):
    return {f"{k}.{n}": p.detach() for k, m in tuned.modules(Behind).items() for n, p in m.named_parameters()}


def test_nothing_of_it_trains_on_bert_base_and_one_adapter_is_stored():
    assert counted("adapter_soup") == 0
    assert counted("adapter_soup", train=True) == 894_528


@pytest.mark.acid("adapter_soup", 1)
@pytest.mark.parametrize("times", [1, 3])
def test_the_soup_of_one_or_of_its_copies_is_that_adapter(tmp_path, times):
    place = saved(tmp_path, 0)
    soup = adapters(attach(tiny("bert"), "adapter_soup", sources=[place] * times))
    held = open_source(place).tensors
    assert soup.keys() == held.keys()
    assert all(torch.equal(soup[n], held[n]) for n in held)


@pytest.mark.acid("adapter_soup", 2, 5)
def test_every_tensor_is_the_mean_in_any_order(tmp_path):
    places = [saved(tmp_path, seed) for seed in (0, 1, 2)]
    soup = adapters(attach(tiny("bert"), "adapter_soup", sources=places))
    again = adapters(attach(tiny("bert"), "adapter_soup", sources=places[::-1]))
    held = [open_source(place).tensors for place in places]
    for name, value in soup.items():
        wanted = sum(t[name].double() for t in held) / 3
        torch.testing.assert_close(value.double(), wanted, rtol=0, atol=1e-7)
        assert torch.equal(value, again[name])


@pytest.mark.acid("adapter_soup", 3, 4)
def test_a_pass_costs_what_one_adapter_costs_and_is_no_mean_of_two_passes(tmp_path):
    places = [saved(tmp_path, seed, arch="gpt2") for seed in (0, 1)]
    model = tiny("gpt2")
    soup = attach(model, "adapter_soup", sources=places)
    calls = []
    for module in soup.modules(Behind).values():
        keep = module.after
        module.after = lambda x, y, keep=keep: calls.append(1) or keep(x, y)
    found = logits(model)
    assert len(calls) == 3, "one bottleneck a block"
    each = []
    for place in places:
        one = tiny("gpt2")
        load(one, place)
        each.append(logits(one))
    assert (found - sum(each) / 2).abs().max() > 1e-3


def test_without_sources_it_says_what_it_needs():
    with pytest.raises(ConfigError, match=r"no adapters to make one of\. Name tunings of pfeiffer_adapter"):
        attach(tiny("bert"), "adapter_soup")

"""The Hadamard adapter: its own tests, beside those that every method passes."""

import pytest
import torch
from methods.checks import logits, stir
from methods.course import Course
from methods.sizes import trained
from tiny import tiny

from luthier.core import AnatomyError, ConfigError
from luthier.surgery import attach


@pytest.mark.acid("hadamard_adapter", 4)
def test_counts_are_those_of_the_catalogue():
    assert trained("bert", "hadamard_adapter", norms=False) == 18_432
    assert trained("bert", "hadamard_adapter") == 36_864
    assert trained("bert", "hadamard_adapter", sites=("attn.o@last8",)) == 24_576


@pytest.mark.acid("hadamard_adapter", 1, 2)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("at", ["output", "input"])
def test_it_starts_as_the_base_and_merges_into_the_projection(name, at):
    base = logits(tiny(name))
    tuned = attach(tiny(name), "hadamard_adapter", at=at)
    assert torch.equal(logits(tuned.model), base)
    stir(tuned, 0.1)
    expected = logits(tuned.model)
    assert (expected - base).abs().max() > 1e-3
    torch.testing.assert_close(logits(tuned.merge()), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.acid("hadamard_adapter", 3)
def test_in_the_second_phase_the_head_lies_still_to_the_bit_and_the_rest_learns():
    course = Course("hadamard_adapter", 10, probe=0.4, decay=0.1)
    start = course.values()
    heads = [n for n in start if n.startswith("head/")]
    course.run(4)
    probed = course.values()
    assert all(torch.equal(probed[n], start[n]) != (n in heads) for n in start)
    course.run(6)
    ended = course.values()
    assert all(torch.equal(ended[n], probed[n]) == (n in heads) for n in start)


def test_the_norm_that_trains_is_the_one_that_reads_attention():
    norms = {n for n in attach(tiny("bert"), "hadamard_adapter").trained() if "model/" in n}
    assert norms and all("attention.output.LayerNorm" in n for n in norms)
    norms = {n for n in attach(tiny("llama"), "hadamard_adapter").trained() if "model/" in n}
    assert norms and all("post_attention_layernorm" in n for n in norms)


def test_a_scale_decays_towards_one():
    groups = attach(tiny("bert"), "hadamard_adapter").groups()
    assert groups[0].decay_to == 1.0 and all(n.endswith("scale") for n in groups[0].names)
    assert groups[1].weight_decay == 0.0


def test_a_probe_without_end_and_other_places_are_refused():
    with pytest.raises(ConfigError, match="leaves no step"):
        attach(tiny("bert"), "hadamard_adapter", probe=1.0)
    with pytest.raises(AnatomyError, match=r"Use attn\.o"):
        attach(tiny("bert"), "hadamard_adapter", sites=("ffn.up",))

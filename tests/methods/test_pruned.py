"""Pruned, U-BitFit and S-BitFit: their own tests, beside those that every method passes."""

import math
from dataclasses import replace

import pytest
import torch
from little import little_spec
from methods.course import Course
from methods.sizes import anatomy_of
from tiny import tiny

from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.partial.pruned import Pruned
from luthier.surgery import attach, method
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests


def masks(course):
    return {k: u.mask for k, u in course.tuned.tuning().unfrozen.items() if not k.startswith("head/")}


@pytest.mark.acid("u_bitfit", 2)
@pytest.mark.acid("s_bitfit", 3)
def test_as_many_are_kept_as_the_share_says():
    counted = method("u_bitfit", {"embeddings": False}).n_params(anatomy_of("bert"))
    assert counted == 101_376 and math.floor(0.1 * counted) == 10_137
    for words in ("u_bitfit", "s_bitfit"):
        course = Course(words, 10, share=0.2)
        course.run(10)
        found = masks(course)
        total, kept = sum(m.numel() for m in found.values()), sum(int(m.sum()) for m in found.values())
        if words == "u_bitfit":
            assert kept == math.floor(0.2 * total)
        else:
            assert 0.2 * total - 48 < kept <= 0.2 * total
        whole = [bool(m.all()) or not bool(m.any()) for m in found.values()]
        assert all(whole) == (words == "s_bitfit")


@pytest.mark.acid("u_bitfit", 1)
@pytest.mark.acid("s_bitfit", 1)
def test_at_the_start_nothing_can_be_ranked():
    with pytest.raises(ConfigError, match="every score is zero"):
        Pruned()._masks([torch.zeros(3), torch.zeros(2)], [None, None])


@pytest.mark.acid("u_bitfit", 3)
@pytest.mark.acid("s_bitfit", 2, 4)
def test_a_vector_that_alone_lowers_the_loss_is_kept_and_opposite_worths_cancel_in_it_alone():
    useful, mixed, idle = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([9.0, -9.0, 0.1]), torch.zeros(3)
    vectors = Pruned(unit="vector", share=0.34)._masks([idle, mixed, useful], [None] * 3)
    assert [bool(m.all()) for m in vectors] == [False, False, True]
    entries = Pruned(unit="entry", share=0.34)._masks([idle, mixed, useful], [None] * 3)
    assert entries[1].tolist() == [True, False, False] and entries[2].tolist() == [True, True, False]


def test_long_vectors_are_favoured_unless_worth_is_a_mean():
    long, short = torch.full((6,), 1.0), torch.full((2,), 2.0)
    assert Pruned(unit="vector", share=0.76)._masks([long, short], [None, None])[0].all()
    assert Pruned(unit="vector", share=0.3, normalise=True)._masks([long, short], [None, None])[1].all()


def test_worth_is_minus_change_times_gradient_summed_with_its_sign():
    course = Course("u_bitfit", 10, search=0.4, warm=0.5)
    key = "bitfit:model/bert.encoder.layer.1.output.dense.bias"
    unfrozen = course.tuned.tuning().unfrozen[key]
    course.run(2)
    assert not unfrozen.notes["worth"].any()
    wanted = torch.zeros(48)
    for _ in range(2):
        change = (unfrozen.value - unfrozen.original).clone()
        course.run(1)
        grad = course.trainer.gradients[key]
        ratio = (unfrozen.notes["worth"] - wanted)[change != 0] / (-change * grad)[change != 0]
        assert ratio.min() > 0 and (ratio.max() / ratio.min() - 1) < 1e-2  # to the clipping of the whole gradient
        wanted = unfrozen.notes["worth"].clone()


@pytest.mark.acid("u_bitfit", 4)
@pytest.mark.acid("s_bitfit", 5)
@pytest.mark.parametrize("words", ["u_bitfit", "s_bitfit"])
def test_the_second_phase_begins_at_the_base_and_pruned_biases_stay_there_under_decay(words):
    course = Course(words, 10, search=0.4, decay=0.1)
    start = course.values()
    course.run(4)
    pooler = "bitfit:model/bert.pooler.dense.bias"
    assert not torch.equal(course.values()[pooler], start[pooler])
    course.begin()
    assert all(torch.equal(v, start[n]) for n, v in course.values().items() if not n.startswith("head/"))
    course.run(6)
    for key, mask in masks(course).items():
        assert torch.equal(course.values()[key][~mask], start[key][~mask])


@pytest.mark.parametrize("words", ["u_bitfit", "s_bitfit"])
def test_a_run_stopped_while_it_scores_goes_on_to_the_bit(words, tmp_path):
    spec = little_spec(tmp_path, words, settings={"pruned.search": 0.5})
    run(replace(spec, out=str(tmp_path / "whole")))
    for stop in (5, 6):
        run(replace(spec, out=str(tmp_path / f"at-{stop}")), stop_at=stop)
        resume(tmp_path / f"at-{stop}")
        assert run_digests(tmp_path / f"at-{stop}") == run_digests(tmp_path / "whole")


def test_wrong_inputs_are_refused():
    for name in ("share", "search"):
        for value in (0.0, 1.0):
            with pytest.raises(ConfigError, match="nothing to choose from"):
                method("u_bitfit", {name: value})
    with pytest.raises(CompositionError, match="sparse_adapter prunes what is attached"):
        method("lora+pruned", {}).n_params(anatomy_of("bert"))
    with pytest.raises(CompositionError, match="cannot stand together"):
        method("full+pruned", {})
    assert [p.name for p in attach(tiny("bert"), "pruned").tuning().method.parts()] == ["bitfit", "pruned"]

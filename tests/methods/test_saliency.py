"""Pruning by saliency and U-MAM: their own tests, beside those that every method passes."""

import math

import pytest
import torch
from little import little_spec
from methods.checks import logits
from methods.course import Course
from methods.sizes import anatomy_of
from tiny import inputs, tiny

from luthier import train as run
from luthier.core import CompositionError, ConfigError
from luthier.methods.hybrid.saliency import Saliency
from luthier.methods.parts import own_tensors
from luthier.surgery import attach, load, method
from luthier.workflow import resume
from luthier.workflow.resume_proof import run_digests

SMALL = {"mam.length": 3, "mam.width": 6, "mam.dropout": 0.0}


def attached(tuned):
    return own_tensors.attached(tuned.tuning())


@pytest.mark.acid("u_mam", 1)
@pytest.mark.parametrize("share", [0.07, 0.5])
def test_exactly_the_share_is_kept_ties_included(share):
    ties = [torch.ones(5, 7), torch.zeros(4), torch.ones(3)]
    assert sum(int(m.sum()) for m in Saliency(share=share).kept(ties)) == math.floor(share * 42)
    course = Course("u_mam", 10, **SMALL, **{"saliency.share": share})
    course.run(10)
    masks = course.tuned.tuning().masks
    assert masks.keys() == attached(course.tuned).keys()
    total = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == math.floor(share * total)


def test_counts_before_and_after_are_those_of_the_page():
    whole = method("u_mam").n_params(anatomy_of("roberta"))
    assert whole == 2_369_280 and math.floor(0.25 * whole) == 592_320


@pytest.mark.acid("u_mam", 2)
def test_what_is_pruned_stays_at_zero_under_momentum_and_decay(tmp_path):
    course = Course("u_mam", 120, decay=0.1, **SMALL)
    course.run(120)
    named, masks = attached(course.tuned), course.tuned.tuning().masks
    assert all(not named[n][~mask].any() for n, mask in masks.items())
    assert any(named[n][mask].any() for n, mask in masks.items()) and not course.tuned.tuning().notes
    course.tuned.save(tmp_path / "tuning")
    again = tiny("bert")
    load(again, tmp_path / "tuning")
    assert torch.equal(logits(again), logits(course.tuned.model))


@pytest.mark.acid("u_mam", 3)
def test_a_part_that_reads_zeros_loses_its_entries():
    course = Course("u_mam", 10, **SMALL)
    idle = next(k for k in course.tuned.modules() if k.endswith("ffn_out@1"))
    module = course.tuned.modules()[idle]
    module.add = lambda y, x, factor=1.0, add=module.add: add(y, x * 0, factor)
    with torch.no_grad():
        module.down.bias.fill_(-1.0)  # so that nothing passes the ReLU either
    course.run(10)
    masks = {n: m for n, m in course.tuned.tuning().masks.items() if n.startswith(f"{idle}.") and "up.bias" not in n}
    kept, total = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    assert total > 500 and kept <= 0.05 * total


@pytest.mark.acid("u_mam", 4)
def test_worth_is_the_size_of_number_times_gradient_summed_over_the_scored_steps():
    tuned = attach(tiny("bert"), method("lora+saliency", {"lora.rank": 2, "saliency.search": 0.5}))
    chosen = tuned.tuning().method.parts()[1]
    chosen.enter(tuned, 0)
    named, wanted = attached(tuned), {}
    with torch.no_grad():
        for p in named.values():
            p.add_(0.1)
    for step in range(1, 9):  # of 16: the first phase has 8 steps, its second half counts
        tuned.model.zero_grad()
        loss = tuned.model(**inputs(tuned.model, seed=step)).loss
        loss.backward()
        chosen.after_backward(tuned, step, 16)
        if step > 4:
            apart = torch.autograd.grad(tuned.model(**inputs(tuned.model, seed=step)).loss, list(named.values()))
            for (n, p), g in zip(named.items(), apart, strict=True):
                wanted[n] = wanted.get(n, 0) + (p.detach() * g).abs()
    for n, worth in wanted.items():
        torch.testing.assert_close(tuned.tuning().notes[f"worth.{n}"], worth, rtol=1e-4, atol=1e-8)


@pytest.mark.acid("u_mam", 5)
def test_worth_goes_with_what_the_loss_changes_by_when_an_entry_is_dropped():
    tuned = attach(tiny("bert"), method("lora+saliency", {"lora.rank": 2, "saliency.search": 0.5}))
    named, chosen = attached(tuned), tuned.tuning().method.parts()[1]
    chosen.enter(tuned, 0)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(3)
        for p in named.values():
            p.copy_(0.02 * torch.randn(p.shape, generator=draw))
    tuned.model.eval()
    batch = inputs(tuned.model)
    loss = tuned.model(**batch).loss
    loss.backward()
    chosen.after_backward(tuned, 8, 16)
    worth, change = [], []
    for n, p in named.items():
        for i in range(0, p.numel(), 37):
            with torch.no_grad():
                value = p.flatten()[i].item()
                p.view(-1)[i] = 0
                change.append(abs(float(tuned.model(**batch).loss - loss.detach())))
                p.view(-1)[i] = value
            worth.append(float(tuned.tuning().notes[f"worth.{n}"].flatten()[i]))
    ranks = torch.stack([torch.tensor(v).argsort().argsort().double() for v in (worth, change)])
    assert len(worth) > 20 and torch.corrcoef(ranks)[0, 1] > 0.8


def test_the_second_phase_begins_at_the_start():
    course = Course("u_mam", 10, **SMALL)
    start = {n: p.detach().clone() for n, p in attached(course.tuned).items()}
    course.run(3)
    assert not course.tuned.tuning().masks
    tuning, part = course.tuned.tuning(), course.tuned.tuning().method.parts()[1]
    part.enter(course.tuned, 1)
    for n, p in attached(course.tuned).items():
        assert torch.equal(p.detach(), start[n] * tuning.masks[n])


@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_run_goes_on_to_the_bit(stop, tmp_path):
    spec = little_spec(tmp_path, "lora+saliency", steps=8, out=str(tmp_path / "whole"))
    run(spec, progress=False)
    from dataclasses import replace

    run(replace(spec, out=str(tmp_path / "cut")), stop_at=stop, progress=False)
    resume(tmp_path / "cut")
    assert run_digests(tmp_path / "cut") == run_digests(tmp_path / "whole")


def test_what_cannot_be_pruned_is_refused():
    with pytest.raises(CompositionError, match="mlp_width=0"):
        attach(tiny("bert"), "mam+saliency")
    with pytest.raises(ConfigError, match="no entry had a gradient"):
        Saliency().kept([torch.zeros(8)])
    with pytest.raises(ConfigError, match="nothing to choose from"):
        Saliency(share=1.0)
    for words in ("adalora+saliency", "increlora+saliency"):
        with pytest.raises(CompositionError, match="chooses entries itself"):
            attach(tiny("bert"), words)
    for words in ("p_tuning+saliency", "hiwi+saliency"):
        with pytest.raises(CompositionError, match="a network makes the numbers of"):
            attach(tiny("bert"), words)

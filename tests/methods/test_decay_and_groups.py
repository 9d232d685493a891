"""Rates and decays of every method: groups name what trains, and decay leaves norms and biases alone."""

import pytest
import torch
from cells import small
from kinds import prepared
from little import Heard, little_spec
from tiny import inputs, tiny

from luthier import train
from luthier.core import AnatomyError, CompositionError, ConfigError
from luthier.runs.spec import OptimSpec
from luthier.surgery import METHODS, Group, attach, method
from luthier.training.optimiser import Optimiser, optimiser_of


def paces(tuned):
    return {n: (g.lr_factor, g.weight_decay, g.decay_to) for g in tuned.groups() for n in g.names}


@pytest.mark.parametrize("name", METHODS.names())
def test_groups_name_the_same_tensors_alone_and_beside_another_tuning(name):
    try:
        tuned = attach(tiny("bert"), small(name))
    except AnatomyError:
        tuned = attach(tiny("llama", "lm"), small(name))  # it is for decoders
    alone = paces(tuned)
    assert set(alone) <= set(tuned.trained())
    partner = method("lora", {"sites": ("ffn.up",), "rank": 2})
    try:
        tuned.add(partner, name="other", train_head=False)
    except CompositionError:
        return  # full and lst stand alone
    assert set(paces(tuned)) <= set(tuned.trained())
    assert {n.removeprefix("default:"): pace for n, pace in paces(tuned).items()} == alone


def test_the_norms_of_a_sequential_adapter_do_not_decay_beside_another_tuning():
    tuned = attach(tiny("bert"), "sequential_adapter", width=6)
    tuned.add(method("lora", {"rank": 2}), name="other", train_head=False)
    trained = tuned.trained()
    optimiser = Optimiser(trained, tuned.groups(), OptimSpec(weight_decay=0.5), 0.1)
    norms = {n: p.detach().clone() for n, p in trained.items() if "LayerNorm" in n}
    assert len(norms) == 12
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(1.0)
    assert all(torch.equal(trained[n], before) for n, before in norms.items())


def test_a_group_of_what_does_not_train_is_refused_by_name():
    tuned = attach(tiny("bert"), "lora")
    with pytest.raises(ConfigError, match="'ghost', which does not train"):
        Optimiser(tuned.trained(), [Group(("ghost",))], OptimSpec(), 0.1)


@pytest.mark.parametrize(
    ("name", "arch"),
    [("full", "bert"), ("full", "llama"), ("full", "t5"), ("child_tuning_d", "bert"), ("head_only", "bert"),
     ("lst", "bert"), ("lst", "llama"), ("parallel_adapter", "bert"), ("mam", "bert"), ("unipelt", "bert"),
     ("adamix", "bert"), ("sequential_adapter", "gpt2"), ("lora", "bert")],
)  # fmt: skip
def test_decay_moves_matrices_and_neither_norms_nor_biases(name, arch):
    model = tiny(arch)
    tuned = prepared(attach(model, "head_only", pooler=True) if name == "head_only" else attach(model, small(name)),
                     inputs(model))  # fmt: skip
    trained = tuned.trained()
    optimiser = optimiser_of(OptimSpec(weight_decay=0.5), trained, tuned.groups(), 0.1)
    kept = set()
    for module in model.modules():
        for short, parameter in module.named_parameters(recurse=False):
            if "Norm" in type(module).__name__ or short == "bias":
                kept.add(id(parameter))
    before = {n: p.detach().clone() for n, p in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step(1.0)
    moved = {n for n, p in trained.items() if not torch.equal(p, before[n])}
    assert moved and not [n for n in moved if id(trained[n]) in kept]
    still = {n for n, p in trained.items() if n not in moved and id(p) not in kept and before[n].any()}
    assert not still, "what is neither a norm nor a bias decays"
    decays, rests = optimiser.decayed()
    assert decays + rests == sum(p.numel() for p in trained.values())
    assert rests == sum(p.numel() for p in trained.values() if id(p) in kept)


def test_a_run_says_what_decays_and_what_does_not(tmp_path):
    heard = Heard()
    spec = little_spec(tmp_path, "full", steps=2, optim=OptimSpec(lr=1e-3, weight_decay=0.1))
    train(spec, listener=heard)
    (line,) = [line for line in heard.lines if line.startswith("weight decay 0.1")]
    assert "norms, biases" in line


def test_pages_say_what_decay_leaves_alone():
    assert "leaves norms and biases alone" in METHODS.card("full").page

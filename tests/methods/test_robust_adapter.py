"""Robust adapters: the acid tests of its paper, beside those that every method passes; a chain of two runs."""

import dataclasses

import pytest
import torch
from fillers import encoder
from little import little_data, little_spec
from methods.checks import counted
from safetensors.torch import load_file

from luthier import train
from luthier.core import ConfigError, WrongBase
from luthier.methods.parts.closing import Closing
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.surgery import attach
from luthier.workflow import resume
from luthier.workflow.load_model import find_model, load_model
from luthier.workflow.resume_proof import run_digests


def spec_of(home, **changes):
    model = encoder(home / "encoder")
    rows = little_data(home / "rows.csv")
    given = {
        "data": DataSpec(source=str(rows)),
        "model": str(model),
        "method": "robust_adapter",
        "settings": {"width": 6},
    }
    return little_spec(home, **{**given, "steps": 4, "optim": OptimSpec(lr=3e-3), **changes})


def first_run(home, **changes):
    return train(spec_of(home, task="masked_lm", out=str(home / "first"), **changes))


def adapters(path):
    held = load_file(path / "tuning" / "tuning.safetensors")
    return {n: t for n, t in held.items() if not n.startswith("head/")}


def base_of(tuned):
    """The encoder's own numbers, by their names inside it, without what a pooler adds."""
    trained = {id(p) for p in tuned.trained().values()}
    names = dict(tuned.model.base_model.named_parameters())
    return {n: p.detach().clone() for n, p in names.items() if id(p) not in trained and "pooler" not in n}


def test_counts_are_those_of_the_catalogue():
    assert counted("robust_adapter") == 2_379_264
    assert counted("robust_adapter", width=256) == 9_461_760


@pytest.mark.acid("robust_adapter", 1)
@pytest.mark.acid("robust_adapter", 2)
def test_the_second_run_begins_where_the_first_ended_and_the_base_lies_still(tmp_path):
    first = first_run(tmp_path)
    model, _ = load_model(
        find_model(spec_of(tmp_path).model), _classes(),
        dtype=torch.float32, device=torch.device("cpu"), seed=0,
    )  # fmt: skip
    tuned = attach(model, "robust_adapter", sources=[first.path])
    held = adapters(first.path)
    for key, module in tuned.modules(Closing).items():
        for name, tensor in module.state_dict().items():
            assert torch.equal(tensor, held[f"{key}.{name}"])
    before = base_of(tuned)
    second = train(spec_of(tmp_path, settings={}, sources=(str(first.path),), out=str(tmp_path / "second")))
    assert adapters(second.path).keys() == held.keys()
    assert all(not torch.equal(t, held[n]) for n, t in adapters(second.path).items() if n.endswith("weight"))
    for run in (first, second):
        after = base_of(run.tuned)
        assert all(torch.equal(after[n], t) for n, t in before.items()) and len(before) > 30


def _classes():
    from luthier.data.tasks import Task

    return Task(name="classification", labels=("bad", "good", "red"))


@pytest.mark.acid("robust_adapter", 3)
def test_the_first_run_reads_no_label(tmp_path):
    with_labels = first_run(tmp_path)
    rows = (tmp_path / "rows.csv").read_text().splitlines()
    (tmp_path / "bare.csv").write_text("\n".join(row.rpartition(",")[0] for row in rows) + "\n")
    bare = DataSpec(source=str(tmp_path / "bare.csv"))
    without = train(spec_of(tmp_path, task="masked_lm", data=bare, out=str(tmp_path / "bare")))
    one, other = adapters(with_labels.path), adapters(without.path)
    assert all(torch.equal(one[n], other[n]) for n in one)
    assert with_labels.scores == without.scores


def test_the_chain_is_resumed_to_the_bit(tmp_path):
    first = first_run(tmp_path)
    spec = spec_of(tmp_path, settings={}, sources=(str(first.path),), steps=6)
    train(dataclasses.replace(spec, out=str(tmp_path / "whole")))
    train(dataclasses.replace(spec, out=str(tmp_path / "cut")), stop_at=3)
    resume(tmp_path / "cut")
    assert run_digests(tmp_path / "cut") == run_digests(tmp_path / "whole")


def test_a_source_of_another_base_or_size_and_two_of_them_are_refused(tmp_path):
    first = first_run(tmp_path)
    (tmp_path / "else").mkdir()
    model, _ = load_model(
        find_model(str(encoder(tmp_path / "else" / "encoder", "roberta"))), _classes(), dtype=torch.float32,
        device=torch.device("cpu"), seed=0,
    )  # fmt: skip
    with pytest.raises(WrongBase, match="made for another model"):
        attach(model, "robust_adapter", sources=[first.path])
    spec = spec_of(tmp_path)
    model, _ = load_model(find_model(spec.model), _classes(), dtype=torch.float32, device=torch.device("cpu"), seed=0)
    with torch.no_grad():
        next(iter(model.parameters()))[0] += 1
    with pytest.raises(WrongBase, match="this model's are"):
        attach(model, "robust_adapter", sources=[first.path])
    with pytest.raises(ConfigError, match=r"width=9, and .* was trained with width=6"):
        attach(model, "robust_adapter", sources=[first.path], width=9)
    with pytest.raises(ConfigError, match="goes on from one first run, and 2 are named"):
        attach(model, "robust_adapter", sources=[first.path, first.path])

"""F34 to F37: what has changed between two halves of a run is refused, or applied and said. Nothing is ignored."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, little_spec
from safetensors.torch import load_file, save_file

from luthier.core import ConfigError, IntegrityError
from luthier.runs import RunFolder
from luthier.runs.spec import DataSpec, RunSpec
from luthier.runs.spec_changes import RESUME, SAME_BITS, leaves
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., Path]:
    """A run of 12 steps, 5 to an epoch, that has made some of them; its model and its rows are its own."""

    def make(at: int = 3, **changes: Any) -> Path:
        train(little_spec(tmp_path, **changes), stop_at=at)
        return tmp_path / "run"

    return make


def drifts(path: Path) -> list[dict[str, Any]]:
    return RunFolder.open(path, write=False).drifts()


def resumed(path: Path) -> dict[str, Any]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == "resumed"][-1]


# A value for every field that is not its default and not what `little_spec` says.
OTHER: dict[str, Any] = {
    "model": "elsewhere", "task": "classification", "method": "bitfit", "strategy": "llrd", "settings": {"rank": 2},
    "data.source": "other.csv", "data.test": "test.csv", "data.test_share": 0.3, "data.split_seed": 1,
    "data.delimiter": ";", "data.encoding": "latin-1",
    "data.text": "text", "data.pair": "label", "data.label": "label", "data.prompt": "text", "data.context": "text",
    "data.response": "label", "data.messages": "text", "data.chosen": "text", "data.rejected": "label",
    "data.tokens": "text", "data.tags": "label",
    "data.row_task": "label", "data.fold": "2/5", "sources": ["runs/a"], "also": ["old=old.csv"],
    "data.loss_on": "all", "data.strict": True, "data.accept_refused": 0.1, "max_length": 12, "long": "windows",
    "data.template": "{text} It was {mask}.", "data.words": "good=great,bad=poor,red=red",
    "seed": 1, "precision": "bf16", "store": "fp32",
    "trunk_dropout": "off", "optim.name": "sgd", "optim.lr": 1e-3, "optim.head_lr": 1e-2,
    "optim.schedule": "cosine", "optim.warmup": 0.2, "optim.betas": [0.8, 0.99],
    "optim.eps": 1e-6, "optim.weight_decay": 0.1, "optim.clip": 0.5, "epochs": 2.0,
    "steps": 9, "batch.size": 6, "batch.tokens": 64, "batch.accumulate": 3, "batch.pad_to": 4, "batch.workers": 1,
    "batch.group_by_length": False, "batch.pack": True, "eval.every": 2, "eval.metric": "loss", "eval.patience": 2,
    "eval.best": True, "eval.share": 0.2, "eval.rows": 3, "eval.thresholds": True, "eval.calibrate": True,
    "eval.written": 3, "eval.new_tokens": 9, "eval.forgetting": True,
    "checkpoint.every_steps": 2, "checkpoint.every_seconds": 60.0,
    "checkpoint.keep": 3, "threads": 2, "device": "cpu", "gradient_checkpointing": True, "fast": False, "recheck": 1,
    "out": "elsewhere", "force": True, "chosen": ["epochs"],
}  # fmt: skip


@pytest.mark.fault("F35", "every field")
def test_every_field_has_a_rule_and_a_case() -> None:
    fields = set(leaves(RunSpec(model="m", data=DataSpec(source="s"))))
    assert fields == set(RESUME) == set(OTHER)
    assert {name for name in SAME_BITS if RESUME[name] != "apply"} == set()


@pytest.mark.fault("F35", "refused")
def test_every_exact_field_is_refused_and_nothing_is_written(stopped: Callable[..., Path]) -> None:
    path = stopped()
    before = (path / "events.jsonl").read_bytes()
    for name in [n for n, rule in RESUME.items() if rule == "exact"]:
        with pytest.raises(ConfigError, match=rf"{name}.*must keep {name}"):
            resume(path, changed={name: OTHER[name]})
    assert (path / "events.jsonl").read_bytes() == before
    assert drifts(path) == []


@pytest.mark.fault("F35", "at a boundary")
def test_every_boundary_field_is_refused_inside_an_epoch_and_says_where_it_may_change(
    stopped: Callable[..., Path],
) -> None:
    path = stopped(3)
    for name in [n for n, rule in RESUME.items() if rule == "boundary"]:
        with pytest.raises(ConfigError, match=rf"{name}.*at step 3, the next epoch begins at 5"):
            resume(path, changed={name: OTHER[name]})
    assert drifts(path) == []


@pytest.mark.fault("F35", "applied and said")
def test_every_other_field_is_applied_recorded_and_kept_by_the_next_resume(stopped: Callable[..., Path]) -> None:
    path = stopped(2)
    names = [n for n, rule in RESUME.items() if rule == "apply" and n not in ("out", "device", "epochs")]
    for at, name in enumerate(names):
        heard = Heard()
        try:
            resume(path, changed={name: OTHER[name]}, listener=heard, stop_at=2)
        except ConfigError as error:  # threads, gradient checkpointing may be refused by name; never ignored
            pytest.fail(f"{name}: {error}")
        assert f"changed and applied from step 3 on: {name}: " in heard.text
        assert any(f"{name}: " in said for said in drifts(path)[at]["differences"])
        because = resumed(path)["because"]
        assert any(f"{name}: " in b for b in because) == (name not in SAME_BITS)
        kept = leaves(RunSpec.from_plain(RunFolder.open(path, write=False).spec))
        assert kept[name] == OTHER[name]
    torch.set_num_threads(1)
    # A resume that changes nothing keeps them all, without a further record.
    result = resume(path, changed={"threads": 2})
    torch.set_num_threads(1)
    assert len(drifts(path)) == len(names)
    kept = leaves(RunSpec.from_plain(result.record.spec))
    assert all(kept[name] == OTHER[name] for name in names)
    assert json.loads((path / "run.json").read_text())["spec"]["optim"]["lr"] == 3e-3  # never rewritten


def test_a_changed_rate_is_the_rate_of_the_next_step(stopped: Callable[..., Path]) -> None:
    path = stopped(5)
    result = resume(path, changed={"optim.lr": 1e-4, "optim.schedule": "constant"})
    rates = [e["lr"] for e in RunFolder.open(path, write=False).events() if e["event"] == "step"]
    assert all(r > 1e-3 for r in rates[1:5])
    assert rates[5:] == pytest.approx([1e-4] * 7)
    assert not result.record.bit_exact
    assert any("optim.lr: 0.003 -> 0.0001" in b for b in result.record.because)


def test_a_changed_micro_batch_budget_is_applied(stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = stopped(5)
    from luthier.training.loop import Loop

    seen, inner = [], Loop._gradients

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        seen.append(max(b.inputs["input_ids"].numel() for b in micro_batches))
        return inner(self, step, micro_batches)

    monkeypatch.setattr(Loop, "_gradients", gradients)
    resume(path, changed={"batch.tokens": 24})
    assert seen and max(seen) <= 24


def test_a_batch_size_changed_between_epochs_counts_rows_from_there(stopped: Callable[..., Path]) -> None:
    """Two epochs of 5 steps of 8; after the first the second is made in 10 steps of 4, and each row is seen once."""
    path = stopped(5, steps=None, epochs=2.0)
    resume(path, changed={"batch.size": 4}, stop_at=7)
    result = resume(path)  # what was changed holds without being said again
    steps = [e for e in RunFolder.open(path, write=False).events() if e["event"] == "step"]
    assert [e["step"] for e in steps] == list(range(1, 16))
    first, second = sum(e["tokens"] for e in steps[:5]), sum(e["tokens"] for e in steps[5:])
    assert first == second
    assert result.record.status == "finished"


def test_more_epochs_and_fewer_steps_are_applied(stopped: Callable[..., Path]) -> None:
    path = stopped(3)
    resume(path, changed={"epochs": 1.6})
    steps = [e["step"] for e in RunFolder.open(path, write=False).events() if e["event"] == "step"]
    assert steps == list(range(1, 9))


@pytest.mark.fault("F34", "data")
def test_changed_rows_are_refused_and_go_on_only_when_accepted(stopped: Callable[..., Path], tmp_path: Path) -> None:
    """F34."""
    path = stopped()
    data = tmp_path / "rows.csv"
    lines = data.read_text().splitlines(keepends=True)
    data.write_text("".join([*lines[:3], lines[3].replace(",", " moon,"), *lines[4:]]))
    with pytest.raises(IntegrityError, match=r"data changed.*--accept-drift data") as caught:
        resume(path)
    assert caught.value.exit_code == 4
    heard = Heard()
    result = resume(path, accept_drift=["data"], listener=heard)
    assert "not bit-exact: data changed since the run began" in heard.text
    assert not result.record.bit_exact
    assert "data changed" in drifts(path)[0]["differences"][0]


def test_accepted_data_need_not_be_accepted_again(stopped: Callable[..., Path], tmp_path: Path) -> None:
    path = stopped()
    with (tmp_path / "rows.csv").open("a") as file:
        file.write("what is the moon bad,bad\n")
    resume(path, accept_drift=["data"], stop_at=4)
    resume(path)
    assert len(drifts(path)) == 1


@pytest.mark.fault("F34", "model")
def test_a_changed_model_is_refused_unless_accepted(stopped: Callable[..., Path], tmp_path: Path) -> None:
    path = stopped()
    weights = tmp_path / "bert" / "model.safetensors"
    tensors = load_file(weights)
    tensors["embeddings.word_embeddings.weight"][5, 5] += 1
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(IntegrityError, match="--accept-drift model"):
        resume(path, accept_drift=["data"])
    assert not resume(path, accept_drift=["model"]).record.bit_exact


@pytest.mark.fault("F36", "said")
@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("torch", "2.1.0", "torch 2.1.0 -> "),
        ("threads", 7, "threads 7 -> 1"),
        ("device", "cuda:0", "device cuda:0 -> cpu"),
    ],
)
def test_another_library_or_machine_goes_on_and_says_that_it_is_not_exact(
    field: str, value: Any, said: str, stopped: Callable[..., Path]
) -> None:
    """F36."""
    path = stopped()
    here = json.loads((path / "environment.json").read_text())
    (path / "environment.json").write_text(json.dumps({**here, field: value}))
    heard = Heard()
    result = resume(path, listener=heard)
    assert f"not bit-exact: {said}" in heard.text
    assert not result.record.bit_exact
    assert any(b.startswith(said) for b in result.record.because)


def test_an_undisturbed_resume_says_that_it_is_exact(stopped: Callable[..., Path]) -> None:
    path = stopped()
    heard = Heard()
    result = resume(path, listener=heard)
    assert result.record.bit_exact and result.record.because == ()
    assert "not bit-exact" not in heard.text
    assert resumed(path)["bit_exact"] is True


@pytest.mark.fault("F38", "exact")
def test_workers_may_change_without_changing_a_bit(stopped: Callable[..., Path], tmp_path: Path) -> None:
    path = stopped()
    resume(path, changed={"batch.workers": 2})
    train(little_spec(tmp_path, out=str(tmp_path / "whole")))
    assert run_digests(path) == run_digests(tmp_path / "whole")


def test_a_field_that_no_run_has_is_named(stopped: Callable[..., Path]) -> None:
    path = stopped()
    for name in ("optim.learning_rate", "lr.peak", "nothing"):
        with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
            resume(path, changed={name: 1})


def test_a_crash_while_a_change_is_recorded_loses_nothing(
    stopped: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped(5, steps=None, epochs=2.0)

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "accept_drift", die)
        with pytest.raises(KeyboardInterrupt):
            resume(path, changed={"batch.size": 4})
    resume(path)  # as it was: the change was never recorded
    steps = [e["step"] for e in RunFolder.open(path, write=False).events() if e["event"] == "step"]
    assert steps == list(range(1, 11))

"""What holds how much: counted from the tensors that are there."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_spec
from tiny import tiny
from torch import nn

from luthier.runs import RunFolder
from luthier.runs.spec import BatchSpec, OptimSpec
from luthier.surgery import METHODS, attach
from luthier.training import longest as longest_file
from luthier.training.loop import Loop
from luthier.training.memory_parts import Parts, whole_memory
from luthier.training.optimiser import Optimiser
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def test_each_part_is_the_bytes_of_its_tensors() -> None:
    tuned = attach(tiny("bert", "classification"), METHODS.get("lora")(rank=3), seed=0)  # type: ignore[call-arg]
    optimiser = Optimiser(tuned.trained(), [], OptimSpec(), 1e-3)
    trained = sum(p.nbytes for p in optimiser.named.values())
    frozen = sum(p.nbytes for p in tuned.model.parameters() if not p.requires_grad)
    buffers = sum(b.nbytes for b in tuned.model.buffers())
    heads = sum(u.kept.nbytes for t in tuned.tunings.values() for u in t.unfrozen.values())
    parts = Parts(tuned, optimiser, torch.device("cpu"))
    x, layer = torch.randn(6, 5), nn.Linear(5, 7)
    with parts.watching():
        h = layer(x)
        (torch.tanh(h).view(2, 21)[:1] ** 2).sum()
    for parameter in optimiser.named.values():
        parameter.grad = torch.zeros_like(parameter)
    found = parts.counted()
    assert found["weights"] == frozen + buffers + heads
    assert found["trained"] == found["gradients"] == trained
    assert found["optimiser"] == 2 * trained
    # x, for the weight; tanh's result, whole though only a half of it is squared
    assert found["activations"] == x.nbytes + h.nbytes
    assert "logits" not in found


def test_a_storage_counts_once_and_weights_are_no_activations() -> None:
    tuned = attach(tiny("llama", "lm"), METHODS.get("lora")(rank=3), seed=0)  # type: ignore[call-arg]
    parts = Parts(tuned, Optimiser(tuned.trained(), [], OptimSpec(), 1e-3), torch.device("cpu"))
    head = tuned.model.get_output_embeddings()
    x = torch.randn(4, head.weight.shape[1], requires_grad=True)
    with parts.watching():
        logits = x @ head.weight.T  # keeps the weight
        (logits.exp() * logits.exp()).sum()  # keeps each result twice
    found = parts.counted()
    assert found["logits"] == 2 * logits.nbytes
    assert found["activations"] == 0


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_watching_changes_no_bit_of_a_pass(kind: str) -> None:
    found = []
    for watch in (False, True):
        tuned = attach(tiny(kind, "classification" if kind == "bert" else "lm"), METHODS.get("lora")(), seed=0)  # type: ignore[call-arg]
        optimiser = Optimiser(tuned.trained(), [], OptimSpec(), 1e-3)
        parts = Parts(tuned, optimiser, torch.device("cpu"))
        ids = torch.arange(12).view(2, 6)
        torch.manual_seed(0)
        tuned.model.train()
        if watch:
            with parts.watching():
                out = tuned.model(input_ids=ids).logits
                out.pow(2).sum().backward()
            assert parts.counted()["activations"] > 0
        else:
            tuned.model(input_ids=ids).logits.pow(2).sum().backward()
        found.append({n: p.grad for n, p in tuned.trained().items() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_what_is_not_explained_is_said_and_what_was_not_held_together_too() -> None:
    parts = {"weights": 10, "activations": 5}
    assert whole_memory(parts, 3, 20) == {"program": 3, **parts, "other": 2}
    assert whole_memory(parts, 3, 16)["other"] == -2
    assert whole_memory(parts, 0, 20) == {**parts, "other": 5}  # a GPU's memory holds no program
    assert whole_memory({}, 3, 20) == {} and whole_memory(parts, 3, None) == {}


def test_a_run_measures_its_parts_in_the_trial_and_records_them(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, passes = Loop._gradients, []

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        passes.append(step)
        return inner(self, step, micro_batches)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "_gradients", gradients)
        whole = train(little_spec(home, steps=4, out=str(tmp_path / "whole")))
    assert passes == [0, 0, 1, 2, 3]  # the trial that was always made, and no other
    memory = json.loads((tmp_path / "whole" / "record.json").read_text())["memory"]
    assert memory == whole.memory == whole.record.memory
    assert set(memory) == {"program", "weights", "trained", "gradients", "optimiser", "activations", "other"}
    trained = sum(p.nbytes for p in whole.tuned.trained().values())
    assert memory["trained"] == trained and memory["optimiser"] == 2 * trained
    assert sum(memory.values()) == whole.record.peak_bytes

    train(little_spec(home, steps=4, out=str(tmp_path / "halves")), stop_at=2)
    resumed = resume(tmp_path / "halves")
    parts = {"program", "other"}  # of this process
    assert {n: b for n, b in resumed.memory.items() if n not in parts} == {
        n: b for n, b in memory.items() if n not in parts
    }
    assert run_digests(tmp_path / "whole") == run_digests(tmp_path / "halves")


def test_a_first_step_as_wide_as_any_is_the_trial_and_counts_the_same(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner, passes, found = Loop._gradients, [], []

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        passes.append(step)
        return inner(self, step, micro_batches)

    monkeypatch.setattr(Loop, "_gradients", gradients)
    for name in ("itself", "apart"):
        if name == "apart":
            monkeypatch.setattr(longest_file, "as_wide", lambda batch, longest: False)
        passes.clear()
        one = BatchSpec(size=64, tokens=4096)  # all rows in one step, so each is as wide as any
        result = train(little_spec(home, steps=3, batch=one, out=str(tmp_path / name)))
        found.append({n: b for n, b in result.memory.items() if n not in ("program", "other")})
        assert passes == ([0, 1, 2] if name == "itself" else [0, 0, 1, 2])
    assert found[0] == found[1] and found[0]["activations"] > 0
    assert run_digests(tmp_path / "itself") == run_digests(tmp_path / "apart")


def test_checkpointing_and_updates_inside_the_backward_pass_show_in_the_parts(home: Path, tmp_path: Path) -> None:
    def memory(name: str, optim: str, checkpointing: bool) -> dict[str, int]:
        return train(
            little_spec(
                home, "full", steps=3, batch=BatchSpec(size=8, tokens=400),
                optim=OptimSpec(name=optim, lr=0.01),  # type: ignore[arg-type]
                gradient_checkpointing=checkpointing, out=str(tmp_path / name),
            )
        ).memory  # fmt: skip

    adamw, lomo = memory("adamw", "adamw", False), memory("lomo", "lomo", False)
    lean = memory("lean", "lomo", True)
    assert adamw["gradients"] == adamw["trained"] and adamw["optimiser"] == 2 * adamw["trained"]
    assert lomo["optimiser"] == 0 and lomo["gradients"] < lomo["trained"] / 2  # the largest tensor alone
    assert lean["activations"] < lomo["activations"] / 2
    assert RunFolder.open(tmp_path / "lean", write=False).finished

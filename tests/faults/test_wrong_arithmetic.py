"""F25: arithmetic that goes wrong without an error is found where a step is computed twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from little import at_call, little_spec, made_of
from tiny import tiny
from tiny_methods import small

from luthier.anatomy import Anatomy
from luthier.core import AnatomyError, WrongArithmetic
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import CheckpointSpec, RunSpec
from luthier.surgery import METHODS, Method
from luthier.training.loop import Loop
from luthier.training.objective import Objective
from luthier.training.recheck import differing
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path, **changes: Any) -> RunSpec:
    return little_spec(home, steps=6, out=str(out), checkpoint=CheckpointSpec(every_steps=1), **changes)


@pytest.fixture(scope="session")
def whole(home: Path) -> dict[str, str]:
    train(spec_of(home, home / "whole"))
    return run_digests(home / "whole")


def flip(tensor: torch.Tensor, bit: int = 3) -> None:
    """One low bit of one number."""
    tensor.detach().flatten()[:1].view(torch.int32).bitwise_xor_(1 << bit)


def flipped_activation(patch: Patch, k: int) -> list[int]:
    """In the k-th forward pass, one low bit of one number that a layer gives on is another."""
    inner, calls = Objective.__call__, [0]

    def call(self: Objective, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] != k:
            return inner(self, batch)
        layer = self.tuned.model.get_submodule("bert.encoder.layer.0.output")
        hook = layer.register_forward_hook(lambda module, given, out: flip(out, 18))
        try:
            return inner(self, batch)
        finally:
            hook.remove()

    patch.setattr(Objective, "__call__", call)
    return calls


@pytest.mark.fault("F25", "found and stopped")
@pytest.mark.parametrize("pass_", ["first", "second"])
def test_one_wrong_bit_in_an_activation_ends_the_run_without_an_update(
    pass_: str, home: Path, tmp_path: Path, monkeypatch: Patch, whole: dict[str, str]
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        seen: list[int] = []
        inner = Loop._recheck

        def recheck(self: Loop, step: int, micro_batches: Any, losses: Any) -> None:
            seen.append(calls[0])
            inner(self, step, micro_batches, losses)

        calls = flipped_activation(patched, 0)
        patched.setattr(Loop, "_recheck", recheck)
        train(spec_of(home, tmp_path / "counted", recheck=1))
        # `seen[3]` passes lie behind when the gradient of step 4 is whole for the first time.
        patched.setattr(Loop, "_recheck", inner)
    flipped_activation(monkeypatch, seen[3] if pass_ == "first" else seen[3] + 1)
    with pytest.raises(
        WrongArithmetic, match=r"step 4: computed twice, \d+ results differ \(.*faulty hardware"
    ) as caught:
        train(spec_of(home, out, recheck=1))
    assert caught.value.exit_code == 17
    monkeypatch.undo()
    run = RunFolder.open(out, write=False)
    (event,) = [e for e in run.events() if e["event"] == "wrong_arithmetic"]
    assert event["step"] == 4 and event["n_differ"] == len(event["differ"]) > 0
    found, skipped = load_newest(run)
    assert found is not None and found.step == 3 and skipped == []
    assert not (out / "tuning").exists()
    resume(out)  # on a machine that computes rightly
    assert {k: v for k, v in run_digests(out).items() if k != "log"} == {k: v for k, v in whole.items() if k != "log"}


def phased(method: str) -> bool:
    return any(type(part).phases is not Method.phases for part in small(method).parts())


def kind_of(method: str) -> str:
    """An encoder, or a decoder where the method refuses that."""
    try:
        list(small(method).edits(Anatomy.read(tiny("bert"))))
    except AnatomyError:
        return "llama"
    return "bert"


@pytest.mark.fault("F25", "changes nothing else")
@pytest.mark.parametrize("method", METHODS.names())
def test_computing_twice_changes_no_bit_of_any_method(method: str, home: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"steps": 16 if phased(method) else 4, "kind": kind_of(method)}
    changes |= made_of(method, home, kind_of(method))
    train(little_spec(home, method, **changes, out=str(tmp_path / "plain")))
    train(little_spec(home, method, **changes, recheck=2, out=str(tmp_path / "twice")))
    assert run_digests(tmp_path / "plain") == run_digests(tmp_path / "twice")


def test_only_the_steps_that_were_asked_for_are_computed_twice(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    calls = at_call(monkeypatch, Loop, "_gradients", 0, lambda: None)
    train(spec_of(home, tmp_path / "run"))
    plain = calls[0]
    train(spec_of(home, tmp_path / "again", recheck=3))
    assert calls[0] - 2 * plain == 2  # of steps 3 and 6
    before = calls[0]
    train(spec_of(home, tmp_path / "once", recheck=4))
    assert calls[0] - before - plain == 1  # of step 4


def test_differences_are_named_and_a_number_that_is_none_is_none_twice() -> None:
    weights = {"a": torch.ones(3), "b": torch.ones(2), "rests": torch.ones(1)}

    def passes(*values: tuple[float, float, float]) -> Any:
        waiting = iter(values)

        def make() -> list[float]:
            loss, a, b = next(waiting)
            weights["a"].grad, weights["b"].grad = torch.full((3,), a), torch.full((2,), b)
            return [0.5, loss]

        return make

    def compared(first: tuple[float, float, float], second: tuple[float, float, float]) -> list[str]:
        make = passes(first, second)
        return differing(make(), weights, make)

    nan = float("nan")
    assert compared((1.0, 2.0, 3.0), (1.0, 2.0, 3.0)) == []
    assert compared((nan, nan, 3.0), (nan, nan, 3.0)) == []
    assert compared((1.0, 2.0, 3.0), (1.0000001, 2.0, 3.0000002)) == ["loss of micro-batch 1", "b"]
    assert compared((1.0, 0.0, 3.0), (1.0, -0.0, 3.0)) == ["a"]

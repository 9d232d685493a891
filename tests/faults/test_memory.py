"""F17, R8: memory that runs out, at any place and however it is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, at_call, little_spec

from luthier.core import ResourceError
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import BatchSpec, EvalSpec, RunSpec
from luthier.training.evaluate import Evaluator
from luthier.training.loop import Loop
from luthier.training.objective import Objective
from luthier.training.optimiser import Optimiser
from luthier.training.out_of_memory import is_out_of_memory
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
SAID: dict[str, Callable[[], BaseException]] = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "RuntimeError": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    "MemoryError": lambda: MemoryError("Unable to allocate 3.1 GiB for an array"),
}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path, **changes: Any) -> RunSpec:
    """No dropout: how a step is cut then changes nothing but rounding."""
    fields: dict[str, Any] = {
        "trunk_dropout": "off",
        "out": str(out),
        "batch": BatchSpec(size=8, tokens=160, group_by_length=False),
        "eval": EvalSpec(every=4),
        "steps": 8,
        "gradient_checkpointing": False,
    }
    return little_spec(home, **{**fields, **changes})


def raising(how: str) -> Callable[[], Any]:
    def act() -> None:
        raise SAID[how]()

    return act


def losses(path: Path) -> list[float]:
    return [e["loss"] for e in RunFolder.open(path, write=False).events() if e["event"] == "step"]


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


@pytest.fixture(scope="session")
def undisturbed(home: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    out = home / "undisturbed"
    result = train(spec_of(home, out))
    return losses(out), {n: p.detach().clone() for n, p in result.tuned.trained().items()}


# The calls before step 1 are the trials of the widest batch.
PLACES = {
    "forward": (Objective, "__call__", 5),
    "backward": (torch.autograd, "backward", 7),
    "optimiser": (Optimiser, "step", 5),
    "clip": (Optimiser, "clip", 5),
    "norm": (Optimiser, "norm", 5),
}


@pytest.mark.fault("F17", "forward, backward, update")
@pytest.mark.parametrize("how", SAID)
@pytest.mark.parametrize("place", PLACES)
def test_the_run_goes_on_with_smaller_pieces_of_the_same_steps(
    place: str, how: str, home: Path, tmp_path: Path, monkeypatch: Patch,
    undisturbed: tuple[list[float], dict[str, torch.Tensor]],
) -> None:  # fmt: skip
    at_call(monkeypatch, *PLACES[place], raising(how))
    out = tmp_path / "run"
    heard = Heard()
    result = train(spec_of(home, out), listener=heard)
    (event,) = events(out, "out_of_memory")
    assert 1 <= event["step"] <= 8
    assert "out of memory" in heard.text
    assert len(losses(out)) == 8
    # The same global batch and token weighting: R8.
    assert losses(out) == pytest.approx(undisturbed[0], abs=1.5e-6)  # written with six digits: 1e-6 is one of the last
    for name, parameter in result.tuned.trained().items():
        torch.testing.assert_close(parameter, undisturbed[1][name], rtol=1e-4, atol=2e-5)
    assert result.tuned.tuning().finished
    checkpoint, _ = load_newest(RunFolder.open(out, write=False))
    assert checkpoint is not None
    assert checkpoint.state["updates"] == 8  # none left out, none twice
    assert checkpoint.state["budget"] < 160


@pytest.mark.fault("F17", "forward, backward, update")
def test_an_update_that_fails_midway_is_not_made_twice(
    home: Path, tmp_path: Path, monkeypatch: Patch, undisturbed: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    inner, calls = Optimiser._update, [0]

    def update(self: Optimiser, names: list[str], *args: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            inner(self, names[: len(names) // 2], *args)  # half of the tensors have moved
            raise torch.OutOfMemoryError("out of memory")
        inner(self, names, *args)

    monkeypatch.setattr(Optimiser, "_update", update)
    out = tmp_path / "run"
    train(spec_of(home, out))
    (event,) = events(out, "out_of_memory")
    assert (event["step"], event["where"], event["to_step"]) == (5, "update", 0)
    assert losses(out) == pytest.approx(undisturbed[0], abs=1.5e-6)


def test_an_update_that_never_fits_ends_the_run_with_advice(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    inner = Optimiser.step

    def step(self: Optimiser, rate: float) -> None:
        if self.updates == 2:
            raise MemoryError
        inner(self, rate)

    monkeypatch.setattr(Optimiser, "step", step)
    with pytest.raises(ResourceError, match="step 3: the update itself does not fit"):
        train(spec_of(home, tmp_path / "run"))


@pytest.mark.fault("F17", "evaluation")
def test_a_batch_of_evaluation_is_cut_finer_and_stays_so(
    home: Path, tmp_path: Path, monkeypatch: Patch, undisturbed: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    inner, sizes = Evaluator._one, []

    def one(self: Evaluator, batch: Any) -> Any:
        sizes.append(len(batch.rows))
        if len(batch.rows) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    monkeypatch.setattr(Evaluator, "_one", one)
    out = tmp_path / "run"
    train(spec_of(home, out))
    assert losses(out) == undisturbed[0]
    # The trial before step 1 and the scoring at the end meet it; the evaluation between them need not.
    first = next(i for i, n in enumerate(sizes) if n <= 3)
    assert [n for n in sizes[first:] if n > 3] in ([], sorted({n for n in sizes if n > 3}, reverse=True))
    whole = events(home / "undisturbed", "scores")
    for found, expected in zip(events(out, "scores"), whole, strict=True):
        assert found == pytest.approx(expected, abs=1.5e-6)


def test_the_widest_batches_of_training_and_evaluation_come_first(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    inner, widths = Objective.__call__, []

    def call(self: Objective, batch: Any) -> Any:
        widths.append((self.tuned.model.luthier.training, batch.inputs["input_ids"].numel()))
        return inner(self, batch)

    monkeypatch.setattr(Objective, "__call__", call)
    train(spec_of(home, tmp_path / "run"))
    (evaluated, wide), (trained, widest) = widths[:2]
    assert not evaluated and trained
    assert widest == max(n for training, n in widths if training)
    assert wide == max(n for training, n in widths[:-2] if not training)


@pytest.mark.fault("F17", "before step 1")
def test_the_trial_finds_what_fits_before_step_1(
    home: Path, tmp_path: Path, monkeypatch: Patch, undisturbed: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    inner = Objective.__call__

    def call(self: Objective, batch: Any) -> Any:
        if batch.inputs["input_ids"].numel() > 50:
            raise RuntimeError("CUDA error: out of memory")
        return inner(self, batch)

    monkeypatch.setattr(Objective, "__call__", call)
    out = tmp_path / "run"
    train(spec_of(home, out))
    assert {e["step"] for e in events(out, "out_of_memory")} == {0}
    assert losses(out) == pytest.approx(undisturbed[0], abs=1.5e-6)


def test_a_row_that_does_not_fit_alone_is_refused_with_its_length(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    inner = Objective.__call__

    def call(self: Objective, batch: Any) -> Any:
        if self.tuned.model.luthier.training:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    monkeypatch.setattr(Objective, "__call__", call)
    with pytest.raises(ResourceError, match=r"one row of \d+ tokens alone does not fit.*Lower max_length") as caught:
        train(spec_of(home, tmp_path / "run"))
    assert caught.value.exit_code == 5


@pytest.mark.fault("F17", "exact resume")
def test_a_run_whose_memory_ran_out_resumes_to_the_bit(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patched:
        at_call(patched, Objective, "__call__", 9, raising("MemoryError"))
        train(spec_of(home, tmp_path / "whole", trunk_dropout="on"))
    with monkeypatch.context() as patched:
        at_call(patched, Objective, "__call__", 9, raising("MemoryError"))
        train(spec_of(home, tmp_path / "halves", trunk_dropout="on"), stop_at=6)
    resume(tmp_path / "halves")
    assert run_digests(tmp_path / "whole") == run_digests(tmp_path / "halves")


def test_other_errors_are_no_matter_of_memory(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))

    def fail() -> None:
        raise RuntimeError("shapes cannot be multiplied")

    at_call(monkeypatch, Loop, "_loss", 5, fail)
    with pytest.raises(RuntimeError, match="shapes"):
        train(spec_of(home, tmp_path / "run"))


def not_fitting(patch: Patch, most: int, *, checkpointed: int) -> None:
    """Forward passes in training that hold more tokens than `most` (or `checkpointed`, where blocks are) run out."""
    inner = Objective.__call__

    def call(self: Objective, batch: Any) -> Any:
        blocks = any(getattr(m, "gradient_checkpointing", False) for m in self.tuned.model.modules())
        wide = batch.inputs["input_ids"].numel() > (checkpointed if blocks else most)
        if self.tuned.model.luthier.training and wide:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    patch.setattr(Objective, "__call__", call)


def test_activations_are_computed_twice_before_pieces_get_smaller_and_no_bit_changes(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": "auto", "trunk_dropout": "on"}
    train(spec_of(home, tmp_path / "whole", **settings))
    assert events(tmp_path / "whole", "out_of_memory") == []
    heard = Heard()
    with monkeypatch.context() as patched:
        not_fitting(patched, 50, checkpointed=160)
        train(spec_of(home, tmp_path / "run", **settings), listener=heard)
    (event,) = events(tmp_path / "run", "out_of_memory")
    assert event["step"] == 0 and event["gradient_checkpointing"] is True
    assert "activations are computed twice from here on" in heard.text
    assert run_digests(tmp_path / "run") == run_digests(tmp_path / "whole")
    checkpoint, _ = load_newest(RunFolder.open(tmp_path / "run", write=False))
    assert checkpoint is not None and checkpoint.state["checkpointing"] is True and checkpoint.state["budget"] == 160


def test_where_that_is_not_enough_pieces_get_smaller_too(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    not_fitting(monkeypatch, 50, checkpointed=100)
    train(spec_of(home, tmp_path / "run", gradient_checkpointing="auto"))
    first, *others = events(tmp_path / "run", "out_of_memory")
    assert first["gradient_checkpointing"] is True
    assert len(others) == 1 and 50 < others[0]["new_budget"] <= 100  # checkpointed and halved once


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_memory_that_runs_out_later_is_met_alike_and_resumes_to_the_bit(
    kind: str, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": "auto", "trunk_dropout": "on", "kind": kind}
    for name, stop in (("whole", None), ("halves", 5)):
        with monkeypatch.context() as patched:
            at_call(patched, Objective, "__call__", 5, raising("OutOfMemoryError"))
            train(spec_of(home, tmp_path / name, **settings), stop_at=stop)
    heard = Heard()
    resume(tmp_path / "halves", listener=heard)
    assert run_digests(tmp_path / "whole") == run_digests(tmp_path / "halves")
    checkpoint, _ = load_newest(RunFolder.open(tmp_path / "halves", write=False))
    assert checkpoint is not None and checkpoint.state["checkpointing"] is True
    train(spec_of(home, tmp_path / "undisturbed", **settings))
    assert run_digests(tmp_path / "whole") == run_digests(tmp_path / "undisturbed")


def test_who_said_no_keeps_activations(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    not_fitting(monkeypatch, 50, checkpointed=160)
    train(spec_of(home, tmp_path / "run", gradient_checkpointing=False))
    assert all("new_budget" in e for e in events(tmp_path / "run", "out_of_memory"))

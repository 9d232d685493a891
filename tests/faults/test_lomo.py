"""Updates inside the backward pass: equal to updates after it, also where something goes wrong in the middle."""

from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, at_call, little_spec

from luthier.core import ConfigError, Diverged, ResourceError
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import BatchSpec, CheckpointSpec, OptimSpec, RunSpec
from luthier.training.loop import Loop
from luthier.training.objective import Objective
from luthier.training.optimiser import Lomo
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path, name: str = "lomo", clip: float = 1.0, **changes: Any) -> RunSpec:
    fields: dict[str, Any] = {
        "method": "full",
        "optim": OptimSpec(name=name, lr=0.05 if clip else 0.01, clip=clip, weight_decay=0.01),  # type: ignore[arg-type]
        "batch": BatchSpec(size=8, tokens=400),
        "steps": 8,
        "out": str(out),
    }
    return little_spec(home, **{**fields, **changes})


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


def poisoned(patch: Patch, steps: set[int], of: str) -> None:
    """An infinite gradient of one tensor in the update of some steps (from 1), after others have moved."""
    inner = Lomo._arrived
    now = [0]

    def train_step(self: Loop, step: int, *args: Any) -> Any:
        now[0] = step + 1
        return steps_inner(self, step, *args)

    def arrived(self: Lomo, name: str, parameter: Any) -> None:
        if now[0] in steps and of in name and parameter.grad is not None:
            parameter.grad.view(-1)[0] = torch.inf
        inner(self, name, parameter)

    steps_inner = Loop._train_step
    patch.setattr(Loop, "_train_step", train_step)
    patch.setattr(Lomo, "_arrived", arrived)


@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_run_is_that_of_plain_descent_to_the_bit(kind: str, clip: float, home: Path, tmp_path: Path) -> None:
    for name in ("sgd", "lomo"):
        train(spec_of(home, tmp_path / name, name, clip, kind=kind))
    plain, fused = run_digests(tmp_path / "sgd"), run_digests(tmp_path / "lomo")
    assert plain["adapter"] == fused["adapter"] and plain["optimizer"] == fused["optimizer"]
    assert plain["log"] == fused["log"]  # losses, norms, scores
    assert any(e["norm"] > 1.0 for e in events(tmp_path / "lomo", "step"))  # there was something to clip


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_it_resumes_to_the_bit(clip: float, home: Path, tmp_path: Path) -> None:
    train(spec_of(home, tmp_path / "whole", clip=clip))
    train(spec_of(home, tmp_path / "halves", clip=clip), stop_at=3)
    resume(tmp_path / "halves")
    assert run_digests(tmp_path / "whole") == run_digests(tmp_path / "halves")


def test_with_clipping_a_bad_gradient_is_seen_before_anything_moves(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    poisoned(monkeypatch, {4}, "embeddings.word")
    out = tmp_path / "run"
    train(spec_of(home, out))
    (event,) = events(out, "no_update")
    assert (event["step"], event["reason"]) == (4, "non-finite gradient")
    assert events(out, "went_back") == []


def test_without_it_the_run_goes_back_and_makes_no_update_there(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    with monkeypatch.context() as patched:
        poisoned(patched, {4}, "embeddings.word")
        heard = Heard()
        train(spec_of(home, tmp_path / "run", clip=0.0, checkpoint=CheckpointSpec(every_steps=2)), listener=heard)
    (back,) = events(tmp_path / "run", "went_back")
    assert (back["step"], back["to_step"]) == (4, 2)
    assert "embeddings.word" in back["reason"] and "back to step 2" in heard.text
    (event,) = events(tmp_path / "run", "no_update")
    assert (event["step"], event["reason"]) == (4, "non-finite gradient")
    # The same as if the bad gradient had been seen before: plain descent, whose norm tells it.
    inner = Loop._gradients

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        losses = inner(self, step, micro_batches)
        if step + 1 == 4:
            next(p for n, p in self.optimiser.named.items() if "embeddings.word" in n).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return losses

    monkeypatch.setattr(Loop, "_gradients", gradients)
    train(spec_of(home, tmp_path / "plain", "sgd", 0.0, checkpoint=CheckpointSpec(every_steps=2)))
    plain, fused = run_digests(tmp_path / "plain"), run_digests(tmp_path / "run")
    assert plain["adapter"] == fused["adapter"] and plain["log"] == fused["log"]


def test_a_bad_gradient_at_every_step_ends_the_run(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    out = tmp_path / "run"
    poisoned(monkeypatch, set(range(3, 41)), "embeddings.word")
    with pytest.raises(Diverged, match="3 times in a row and again after going back"):
        train(spec_of(home, out, clip=0.0, steps=40, checkpoint=CheckpointSpec(every_steps=2)))
    checkpoint, _ = load_newest(RunFolder.open(out, write=False))
    assert checkpoint is not None and all(t.isfinite().all() for t in checkpoint.tensors["adapter"].values())


def test_a_bad_loss_is_seen_before_the_backward_pass(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    inner = Loop._loss

    def loss(self: Loop, step: int, micro: int, batch: Any) -> torch.Tensor:
        found = inner(self, step, micro, batch)
        return found * torch.nan if step == 4 else found

    monkeypatch.setattr(Loop, "_loss", loss)
    train(spec_of(home, tmp_path / "run", clip=0.0))
    (event,) = events(tmp_path / "run", "no_update")
    assert (event["step"], event["reason"]) == (5, "non-finite loss")
    assert events(tmp_path / "run", "went_back") == []


def test_memory_that_runs_out_inside_the_update_goes_back_and_ends_with_the_same_bits(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    train(spec_of(home, tmp_path / "whole", clip=0.0))

    def fail() -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        at_call(patched, Lomo, "_update", 50, fail)
        train(spec_of(home, tmp_path / "run", clip=0.0))
    (event,) = events(tmp_path / "run", "out_of_memory")
    assert event["where"] == "update" and event["gradient_checkpointing"] is True
    assert run_digests(tmp_path / "run") == run_digests(tmp_path / "whole")


def test_a_step_that_does_not_fit_is_not_cut(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    inner = Objective.__call__

    def call(self: Objective, batch: Any) -> Any:
        if self.tuned.model.luthier.training and len(batch.rows) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return inner(self, batch)

    monkeypatch.setattr(Objective, "__call__", call)
    with pytest.raises(ResourceError, match=r"8 rows of \d+ tokens together do not fit.*Lower batch.size"):
        train(spec_of(home, tmp_path / "run"))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "accumulation": ({"batch": BatchSpec(size=8, tokens=400, accumulate=2)}, "batch.accumulate is 2"),
    "a step in pieces": ({"batch": BatchSpec(size=8, tokens=48)}, r"Use batch.tokens = \d+, or batch.size = 2"),
    "adalora": ({"method": "adalora", "settings": {"target_rank": 2}}, "adalora looks at the gradients"),
    "diff_pruning": ({"method": "diff_pruning", "settings": {}}, "diff_pruning adds a penalty"),
    "child_tuning_d": ({"method": "child_tuning_d", "settings": {}}, "child_tuning_d looks at"),
    "lst": ({"method": "lst", "settings": {}}, "lst looks at"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_where_it_would_not_be_exact_it_is_refused_before_anything_is_written(
    what: str, home: Path, tmp_path: Path
) -> None:
    changes, message = REFUSED[what]
    with pytest.raises(ConfigError, match=message):
        train(spec_of(home, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_scaled_losses_and_rechecks_are_refused_with_it(home: Path, tmp_path: Path) -> None:
    for changes, message in (
        ({"precision": "fp16"}, "precision fp16 scales"),
        ({"recheck": 1}, "recheck = 1 compares"),
    ):
        with pytest.raises(ConfigError, match=message):
            spec_of(home, tmp_path / "run", **changes)


def test_a_tuning_with_few_numbers_may_use_it_too(home: Path, tmp_path: Path) -> None:
    for name in ("sgd", "lomo"):
        train(spec_of(home, tmp_path / name, name, method="lora", settings={"rank": 3}))
    assert run_digests(tmp_path / "sgd")["adapter"] == run_digests(tmp_path / "lomo")["adapter"]

"""F19 to F24, and what must not be called a result: numbers that go wrong in the middle of training."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, little_model, little_spec
from safetensors.torch import load_file, save_file

from luthier.core import DataError, Diverged, IntegrityError, ModelError, NothingTrains
from luthier.runs import RunFolder, load_newest
from luthier.runs.spec import DataSpec, OptimSpec
from luthier.training.guards import LossScale, NumberGuard
from luthier.training.loop import Loop
from luthier.training.optimiser import Optimiser
from luthier.training.precision import Precision
from luthier.workflow import preparation as prepared
from luthier.workflow import resume, train

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def scaled(patch: Patch, factors: dict[int, float]) -> None:
    """Multiply the loss of the first micro-batch of some steps (counted from 1)."""
    inner = Loop._loss

    def loss(self: Loop, step: int, micro: int, batch: Any) -> torch.Tensor:
        found = inner(self, step, micro, batch)
        return found * factors[step + 1] if micro == 0 and step + 1 in factors else found

    patch.setattr(Loop, "_loss", loss)


def poisoned(patch: Patch, steps: set[int]) -> None:
    """Give the first trained tensor an infinite gradient at some steps, where the loss is finite."""
    inner = Loop._gradients

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        losses = inner(self, step, micro_batches)
        if step + 1 in steps:
            first = next(p for p in self.optimiser.named.values() if p.grad is not None)
            assert first.grad is not None
            first.grad.view(-1)[0] = torch.inf
        return losses

    patch.setattr(Loop, "_gradients", gradients)


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


def all_finite(path: Path) -> bool:
    checkpoint, _ = load_newest(RunFolder.open(path, write=False))
    assert checkpoint is not None
    groups = [*checkpoint.tensors.values(), load_file(path / "tuning" / "tuning.safetensors")]
    return all(bool(t.isfinite().all()) for group in groups for t in group.values() if t.is_floating_point())


@pytest.mark.fault("F20", "no update, rows named")
@pytest.mark.fault("F19", "no update, rows named")
@pytest.mark.parametrize("method", ["lora", "adalora"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_one_bad_step_makes_no_update_and_names_its_rows(
    method: str, what: str, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = tmp_path / "run"
    if what == "loss":
        scaled(monkeypatch, {6: float("nan")})
    else:
        poisoned(monkeypatch, {6})
    moved: list[int] = []
    inner = Optimiser.step
    monkeypatch.setattr(Optimiser, "step", lambda self, rate: (moved.append(self.updates), inner(self, rate))[1])
    heard = Heard()
    result = train(little_spec(home, method, out=str(out)), listener=heard)
    assert len(moved) == 11  # of 12 steps
    (event,) = events(out, "no_update")
    assert event["step"] == 6
    assert event["reason"] == f"non-finite {what}"
    assert event["rows"] and all("rows.csv:" in place for place in event["rows"])
    # A loss is its micro-batch's; a gradient is the whole step's.
    assert event["n_rows"] == len(event["rows"]) and (event["n_rows"] < 8) == (what == "loss")
    assert f"step 6: non-finite {what}, no update; rows " in heard.text
    row = events(out, "step")[5]
    assert (row["step"], row["loss"], row["skipped"]) == (6, None, f"non-finite {what}")
    assert all_finite(out)
    assert result.record.status == "finished"


def test_bad_rows_that_come_again_and_again_are_left_out_after_going_back(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    inner, bad = Loop._loss, {3, 14, 20, 25, 31}

    def loss(self: Loop, step: int, micro: int, batch: Any) -> torch.Tensor:
        found = inner(self, step, micro, batch)
        return found * torch.nan if bad & set(batch.rows.tolist()) else found

    monkeypatch.setattr(Loop, "_loss", loss)
    out = tmp_path / "run"
    train(little_spec(home, out=str(out), steps=10))  # bad rows fall into the first steps, three in a row
    (back,) = events(out, "rolled_back")
    assert back["to_step"] < back["from_step"]
    assert back["rows_left_out"] > 0
    rows = events(out, "step")
    assert [r["step"] for r in rows] == list(range(1, 11))
    assert sum(r["loss"] is not None for r in rows) >= 5
    assert all_finite(out)


@pytest.mark.fault("F22", "stop with code 6")
def test_numbers_that_stay_bad_end_with_exit_code_6_and_the_last_good_checkpoint(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        scaled(patched, dict.fromkeys(range(5, 13), float("inf")))
        with pytest.raises(Diverged) as caught:
            train(little_spec(home, out=str(out)))
    assert caught.value.exit_code == 6
    assert "3 times in a row and again after going back" in str(caught.value)
    assert len(events(out, "rolled_back")) == len(events(out, "diverged")) == 1
    assert not (out / "tuning").exists()
    resume(out)  # the cause is gone: the run can go on
    assert all_finite(out)


@pytest.mark.fault("F23", "window stays")
@pytest.mark.fault("F22", "one")
def test_a_spike_makes_no_update_and_one_nan_does_not_blind_the_watch(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """F22, F23."""
    out = tmp_path / "run"
    scaled(monkeypatch, {19: float("nan"), 22: 1000.0})
    train(little_spec(home, out=str(out), steps=25))
    assert [(e["step"], e["reason"]) for e in events(out, "no_update")] == [(19, "non-finite loss"), (22, "loss spike")]
    assert events(out, "rolled_back") == []


def test_a_hard_row_late_in_training_is_no_spike() -> None:
    guard = NumberGuard()
    for step in range(60):
        assert guard.judge(2.0 * 0.9**step, 1.0) is None
    assert guard.judge(1.5, 1.0) is None  # far above the window, not above the start
    assert guard.judge(2000.0, 1.0) == "loss spike"
    assert guard.judge(float("nan"), 1.0) == "non-finite loss"
    assert guard.judge(0.1, float("inf")) == "non-finite gradient"
    assert all(v < 3 for v in guard.seen)


@pytest.mark.fault("F24", "scale")
def test_the_loss_scale_falls_on_overflow_rises_after_peace_and_stops_at_its_floor() -> None:
    """F24."""
    scale = LossScale(True, patience=3)
    start = scale.value
    assert not scale.fits(1.0, float("inf"))
    assert scale.value == start / 2
    assert all(scale.fits(1.0, 1.0) for _ in range(3))
    assert scale.value == start
    for _ in range(16):
        assert not scale.fits(1.0, float("nan"))
    assert scale.value == 1
    with pytest.raises(Diverged, match="bf16 or fp32"):
        scale.fits(1.0, float("inf"))
    assert LossScale(False).fits(1.0, float("inf"))  # elsewhere it is no matter of scale


@pytest.mark.fault("F24", "fp32 masters", "scale")
def test_fp16_trains_with_a_scaled_loss_skips_overflows_and_keeps_fp32_masters(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """F24."""
    monkeypatch.setattr(prepared, "choose_precision", lambda asked, device: Precision("fp16", "for this test"))
    inner = Loop._gradients
    overflows = {2, 3}

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        losses = inner(self, step, micro_batches)
        if step + 1 in overflows:
            next(p for p in self.optimiser.named.values() if p.grad is not None).grad.fill_(torch.inf)  # type: ignore[union-attr]
        return losses

    monkeypatch.setattr(Loop, "_gradients", gradients)
    out = tmp_path / "run"
    result = train(little_spec(home, out=str(out), precision="fp16"))
    rows = events(out, "step")
    assert [r["step"] for r in rows if "fp16 overflow" in r.get("skipped", "")] == [2, 3]
    assert all(p.dtype == torch.float32 for p in result.tuned.trained().values())
    assert all(r["norm"] < 100 for r in rows if r["norm"] is not None)  # scaled back
    assert all_finite(out)


@pytest.mark.fault("F21", "base")
def test_a_base_with_nan_is_refused_by_the_name_of_its_tensor(home: Path, tmp_path: Path) -> None:
    """F21."""
    folder = little_model(tmp_path / "bert")
    tensors = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.attention.self.query.weight"
    tensors[name].view(-1)[7] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises((ModelError, IntegrityError), match=r"layer.1.attention.self.query.weight"):
        train(little_spec(home, model=str(folder), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F30", "masked")
@pytest.mark.fault("F29", "no target")
def test_rows_whose_answers_all_fall_off_are_refused_before_step_1(home: Path, tmp_path: Path) -> None:
    """F30: every label masked."""
    with pytest.raises(DataError) as caught:
        train(little_spec(home, kind="llama", max_length=4, out=str(tmp_path / "run")))
    assert "turns.csv:" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.fault("F30", "one class")
def test_one_class_is_refused_before_step_1(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "one.csv"
    data.write_text("text,label\n" + "".join(f"the moon {w},good\n" for w in ("is", "far", "red", "tall")) * 4)
    with pytest.raises(DataError, match="good"):
        train(little_spec(home, data=DataSpec(source=str(data)), out=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


def test_a_dead_target_ends_the_run_by_its_name(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    inner = Loop._gradients

    def gradients(self: Loop, step: int, micro_batches: Any) -> list[float]:
        losses = inner(self, step, micro_batches)
        for name, parameter in self.optimiser.named.items():
            if name.startswith("attn.v@1"):
                parameter.grad = None
        return losses

    monkeypatch.setattr(Loop, "_gradients", gradients)
    with pytest.raises(NothingTrains, match=r"attn.v@1.*cannot learn"):
        train(little_spec(home, out=str(tmp_path / "run")))
    assert not (tmp_path / "run" / "tuning").exists()


def test_weights_that_do_not_move_end_the_run(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(Optimiser, "step", lambda self, rate: None)
    with pytest.raises(NothingTrains, match="no trained number moved in 3 steps"):
        train(little_spec(home, out=str(tmp_path / "run")))


def test_a_model_that_computes_what_its_base_computes_is_no_result(home: Path, tmp_path: Path) -> None:
    spec = little_spec(home, kind="llama", optim=OptimSpec(lr=1e-30), out=str(tmp_path / "run"))
    with pytest.raises(NothingTrains, match="exactly what its base computes"):
        train(spec)
    assert not (tmp_path / "run" / "tuning").exists()
    assert not (tmp_path / "run" / "record.json").exists()


def test_weights_that_overflow_are_never_saved(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    def explode(self: Optimiser, rate: float) -> None:
        for parameter in self.named.values():
            parameter.data.mul_(1e30).add_(1e30)

    monkeypatch.setattr(Optimiser, "step", explode)
    with pytest.raises(Diverged) as caught:
        train(little_spec(home, out=str(tmp_path / "run")))
    assert caught.value.exit_code == 6
    checkpoint, skipped = load_newest(RunFolder.open(tmp_path / "run", write=False))
    assert checkpoint is not None and skipped == []
    assert all(t.isfinite().all() for t in checkpoint.tensors["adapter"].values())
    assert not (tmp_path / "run" / "tuning").exists()


def test_scores_that_are_not_finite_are_written_as_text(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    from luthier.training.evaluate import Evaluator

    inner = Evaluator.scores_of
    monkeypatch.setattr(Evaluator, "scores_of", lambda self, out: {**inner(self, out), "loss": float("inf")})
    result = train(little_spec(home, steps=3, out=str(tmp_path / "run")))
    assert json.loads((tmp_path / "run" / "scores.json").read_text())["loss"] == "inf"
    assert "loss" not in result.record.scores and "accuracy" in result.record.scores

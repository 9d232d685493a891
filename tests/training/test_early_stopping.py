"""Choosing by a score: what is selected by some rows is not measured by them."""

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, at_call, little_spec

from luthier.core import ConfigError, IntegrityError, Interrupted
from luthier.runs import RunFolder, load_step
from luthier.runs.spec import CheckpointSpec, EvalSpec, RunSpec
from luthier.training.early_stopping import Selection
from luthier.training.evaluate import Evaluator
from luthier.workflow import finish, prepare, resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path, **wanted: Any) -> RunSpec:
    return little_spec(home, steps=8, out=str(out), eval=EvalSpec(every=2, **wanted))


def scripted(patch: Patch, accuracies: list[float]) -> list[int]:
    """Give evaluations these accuracies in turn; returns the rows that each one was of."""
    inner, rows = Evaluator.scores_of, []
    waiting = iter(accuracies)

    def scores_of(self: Evaluator, out: dict[str, Any]) -> dict[str, float]:
        rows.append(len(self.batches.examples))
        return {**inner(self, out), "accuracy": next(waiting)}

    patch.setattr(Evaluator, "scores_of", scores_of)
    return rows


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


def test_rows_to_select_by_come_from_the_training_rows_and_are_the_same_for_every_seed(home: Path) -> None:
    plain = prepare(little_spec(home))
    chosen = prepare(little_spec(home, eval=EvalSpec(best=True, share=0.2)))
    again = prepare(little_spec(home, eval=EvalSpec(best=True, share=0.2), seed=5))
    assert plain.selection is None and chosen.selection is not None and again.selection is not None
    assert plain.test is not None and chosen.test is not None
    assert chosen.fingerprints["test"] == plain.fingerprints["test"]  # the test half has no part in it
    assert len(chosen.train) + len(chosen.selection) == len(plain.train)
    assert chosen.fingerprints["select"] == again.fingerprints["select"] != ""
    places = {p for table in (chosen.train_table,) for p in table.places}
    assert len(places) == len(chosen.train)
    targets = chosen.selection.targets
    assert targets is not None and len(set(targets.tolist())) == 3  # every label stands among them


def test_the_best_step_is_kept_and_the_test_rows_are_scored_once(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    rows = scripted(monkeypatch, [0.4, 0.9, 0.8, 0.7, 0.5])
    result = train(spec_of(home, tmp_path / "run", best=True))
    assert [e["step"] for e in events(tmp_path / "run", "best_taken")] == [4]
    assert len(set(rows[:4])) == 1 and rows[4] != rows[0]  # four times the selection's rows, at last the test's
    assert result.scores["accuracy"] == 0.5
    assert [e["step"] for e in events(tmp_path / "run", "scores")] == [2, 4, 6, 8, 8]
    held = load_step(RunFolder.open(tmp_path / "run", write=False), 4)
    assert held is not None
    best = {n.split("|", 1)[1].replace("|", "."): t for n, t in held.tensors["adapter"].items()}
    for name, parameter in result.tuned.trained().items():
        found = next(t for n, t in best.items() if n in (name, f"{name}.value"))
        assert torch.equal(parameter, found.view_as(parameter))


def test_the_last_step_may_be_the_best(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    scripted(monkeypatch, [0.4, 0.5, 0.6, 0.9, 0.1])
    train(spec_of(home, tmp_path / "run", best=True))
    assert events(tmp_path / "run", "best_taken") == []


def test_patience_ends_the_run_and_a_resumed_run_does_not_go_past_it(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    out = tmp_path / "run"
    scripted(monkeypatch, [0.9, 0.8, 0.7, 0.5])
    with monkeypatch.context() as patched:
        at_call(patched, finish, "_refuse_base", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(spec_of(home, out, patience=2))
    heard = Heard()
    resume(out, listener=heard)
    assert "stopped at step 6" in heard.text
    assert max(e["step"] for e in events(out, "step")) == 6
    assert (out / "record.json").exists()


def test_the_best_survives_a_stop_at_any_step_to_the_bit(home: Path, tmp_path: Path) -> None:
    whole = spec_of(home, tmp_path / "whole", best=True, patience=3)
    train(whole)
    for step in (1, 2, 3, 4, 7):
        out = tmp_path / f"run-{step}"
        train(spec_of(home, out, best=True, patience=3), stop_at=step)
        resume(out)
        assert run_digests(out) == run_digests(tmp_path / "whole")


def test_checkpoints_in_between_never_push_the_best_out(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    scripted(monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.5])
    spec = little_spec(
        home, steps=8, out=str(tmp_path / "run"), eval=EvalSpec(every=2, best=True),
        checkpoint=CheckpointSpec(every_steps=1, keep=1),
    )  # fmt: skip
    train(spec)
    assert [e["step"] for e in events(tmp_path / "run", "best_taken")] == [2]


def test_what_is_not_finite_is_never_the_best() -> None:
    chosen = Selection(EvalSpec(best=True), "loss")
    assert not chosen.note(1, {"loss": float("nan")})
    assert chosen.note(2, {"loss": 2.0})
    assert not chosen.note(3, {"loss": float("inf")})
    assert (chosen.kept, chosen.waited) == (2, 1)
    copy = Selection(EvalSpec(best=True), "loss")
    copy.load(chosen.state())
    assert copy == chosen


def test_selecting_without_evaluations_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"eval.best needs evaluations"):
        EvalSpec(best=True, every=0)
    with pytest.raises(ConfigError, match=r"eval.patience needs evaluations"):
        EvalSpec(patience=2, share=0)


def test_without_a_choice_nothing_is_held_out_and_nothing_is_scored_on_the_way(home: Path, tmp_path: Path) -> None:
    result = train(little_spec(home, steps=6, out=str(tmp_path / "run")))
    assert [e["step"] for e in events(tmp_path / "run", "scores")] == [6]
    assert "accuracy" in result.scores


def adapter_at(out: Path, step: int) -> dict[str, torch.Tensor]:
    held = load_step(RunFolder.open(out, write=False), step)
    assert held is not None
    return held.tensors["adapter"]


def test_the_written_tuning_is_that_of_the_run_which_ended_at_its_best_step(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    """One run goes on for four steps after its best; another is ended there by its patience. They write one file."""
    found = {}
    for name, accuracies, patience in (
        ("went-on", [0.4, 0.9, 0.8, 0.7, 0.5], None),
        ("ended", [0.4, 0.9, 0.1, 0.5], 1),
    ):
        with monkeypatch.context() as patched:
            scripted(patched, accuracies)
            result = train(spec_of(home, tmp_path / name, best=True, patience=patience))
        found[name] = ((tmp_path / name / "tuning" / "tuning.safetensors").read_bytes(), result.scores["loss"])
    assert max(e["step"] for e in events(tmp_path / "went-on", "step")) == 8
    assert max(e["step"] for e in events(tmp_path / "ended", "step")) == 6
    assert found["went-on"] == found["ended"]
    with monkeypatch.context() as patched:
        scripted(patched, [0.4, 0.5, 0.6, 0.9, 0.5])
        train(spec_of(home, tmp_path / "last", best=True))
    assert (tmp_path / "last" / "tuning" / "tuning.safetensors").read_bytes() != found["ended"][0]


@pytest.mark.parametrize("best", [True, False])
def test_of_equal_scores_the_first_is_the_best_and_waiting_goes_on(
    best: bool, home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    scripted(monkeypatch, [0.4, 0.9, 0.9, 0.9, 0.5])
    heard = Heard()
    train(spec_of(home, tmp_path / "run", best=best, patience=2), listener=heard)
    assert "stopped at step 8" in heard.text or max(e["step"] for e in events(tmp_path / "run", "step")) == 8
    assert [e["step"] for e in events(tmp_path / "run", "best_taken")] == ([4] if best else [])


def test_a_score_that_is_better_when_lower_is_chosen_by_being_lower(home: Path, tmp_path: Path) -> None:
    result = train(spec_of(home, tmp_path / "run", best=True, metric="loss"))
    losses = {e["step"]: e["loss"] for e in events(tmp_path / "run", "scores")[:-1]}
    assert len(losses) == 4 and len(set(losses.values())) == 4
    chosen = min(losses, key=losses.__getitem__)
    assert [e["step"] for e in events(tmp_path / "run", "best_taken")] == ([] if chosen == 8 else [chosen])
    assert result.record.status == "finished"


def test_a_run_stopped_between_its_last_step_and_its_result_takes_the_best_when_resumed(
    home: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patched:
        scripted(patched, [0.4, 0.9, 0.8, 0.7, 0.5])
        train(spec_of(home, whole, best=True))
    with monkeypatch.context() as patched:
        scripted(patched, [0.4, 0.9, 0.8, 0.7])
        at_call(patched, finish, "_refuse_base", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            train(spec_of(home, out, best=True))
    # The state at the end is that of step 8; the best step's tensors were only lent to the result.
    assert not all(torch.equal(t, adapter_at(out, 4)[n]) for n, t in adapter_at(out, 8).items())
    with monkeypatch.context() as patched:
        scripted(patched, [0.5])
        resume(out)
    assert run_digests(out)["tuning"] == run_digests(whole)["tuning"] != ""
    assert run_digests(out) == run_digests(whole)


def test_a_best_step_whose_checkpoint_is_damaged_is_no_result(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    out = tmp_path / "run"
    scripted(monkeypatch, [0.4, 0.9, 0.8, 0.7, 0.5])
    train(spec_of(home, out, best=True), stop_at=6)
    best = out / "ckpt" / "step-00000004"
    shutil.copytree(best, tmp_path / "copy")
    content = bytearray((best / "adapter.safetensors").read_bytes())
    content[-5] ^= 1
    (best / "adapter.safetensors").write_bytes(content)
    with pytest.raises(IntegrityError, match=r"the checkpoint of the best step, 4, is gone or damaged") as caught:
        resume(out)
    assert caught.value.exit_code == 4
    assert not (out / "tuning").exists() and not (out / "record.json").exists()
    shutil.rmtree(best, ignore_errors=True)
    shutil.copytree(tmp_path / "copy", best)
    scripted(monkeypatch, [0.5])
    resume(out)
    assert [e["step"] for e in events(out, "best_taken")] == [4]

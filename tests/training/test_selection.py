"""Choosing by a score: what is selected by some rows is not measured by them."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, at_call, little_spec

from luthier.core import ConfigError, Interrupted
from luthier.runs import RunFolder, load_step
from luthier.training import CheckpointSpec, EvalSpec, RunSpec, finish, prepare, resume, train
from luthier.training.evaluate import Evaluator
from luthier.training.proof import run_digests
from luthier.training.selection import Selection

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path, **wanted: Any) -> RunSpec:
    return little_spec(home, steps=8, out=str(out), eval=EvalSpec(every=2, **wanted))


def scripted(patch: Patch, accuracies: list[float]) -> list[int]:
    """Give evaluations these accuracies in turn; returns the rows that each one was of."""
    inner, rows = Evaluator.scores, []
    waiting = iter(accuracies)

    def scores(self: Evaluator) -> dict[str, float]:
        rows.append(len(self.batches.examples))
        return {**inner(self), "accuracy": next(waiting)}

    patch.setattr(Evaluator, "scores", scores)
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
    assert not chosen.hear(1, {"loss": float("nan")})
    assert chosen.hear(2, {"loss": 2.0})
    assert not chosen.hear(3, {"loss": float("inf")})
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

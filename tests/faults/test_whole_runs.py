"""Faults of whole runs that no single part of the engine can be asked about."""

import json
import os
import pty
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from little import Heard, little_model, little_spec

from luthier.cli import main
from luthier.core import ConfigError, IntegrityError
from luthier.runs import RunFolder, checkpoints
from luthier.runs.spec import CheckpointSpec, EvalSpec, RunSpec
from luthier.testing import Template
from luthier.training.loop import Loop
from luthier.workflow import Predictor, resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
TESTS = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)
    try:
        with Template(("torch", "little", "luthier.training", "luthier.cli")) as made:
            yield made
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def spec_of(home: Path, out: Path, **changes: Any) -> RunSpec:
    fields: dict[str, Any] = {"steps": 8, "eval": EvalSpec(every=3), "checkpoint": CheckpointSpec(every_steps=2)}
    return little_spec(home, **{**fields, **changes}, out=str(out))


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


# --- F07


@pytest.mark.fault("F07", "a resume stops")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(spec_of(home, out), stop_at=5)
    for path in checkpoints(RunFolder.open(out, write=False)):
        content = bytearray((path / "optimizer.safetensors").read_bytes())
        content[len(content) // 2] ^= 1
        (path / "optimizer.safetensors").write_bytes(content)
    before = {p: p.read_bytes() for p in (out / "ckpt").rglob("*") if p.is_file()}
    for _ in range(2):
        with pytest.raises(
            IntegrityError, match=r"none of the \d checkpoints verifies, and the run does not start again"
        ):
            resume(out)
    assert {p: p.read_bytes() for p in before} == before
    assert max(e["step"] for e in events(out, "step")) == 5
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        train(spec_of(home, out))


# --- F14


def below_a_terminal(home: str, out: str) -> None:
    """In a child: the command below a terminal that is closed in the middle of training; ends as the command does."""
    spec = Path(out).with_suffix(".toml")
    spec.write_text(spec_of(Path(home), Path(out), steps=100_000, eval=EvalSpec(every=0)).to_toml())
    pid, screen = pty.fork()
    if pid == 0:
        os._exit(main(["train", str(spec), "--out", out]))
    log, shown = Path(out) / "events.jsonl", b""
    while not (log.exists() and log.read_bytes().count(b'"step"') > 3):
        shown += os.read(screen, 4096)
    os.close(screen)
    print(shown.decode(errors="replace"), flush=True)
    os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) % 256)


@pytest.mark.fault("F14", "closed terminal")
def test_a_closed_terminal_ends_the_run_like_any_signal_and_it_resumes(
    template: Template, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    outcome = template.run(__file__, "below_a_terminal", {"home": str(home), "out": str(out)})
    assert outcome.status == 128 + signal.SIGHUP, outcome.output
    (event,) = events(out, "interrupted")
    assert event["signal"] == signal.SIGHUP
    steps = event["step"] + 2
    resume(out, changed={"steps": steps})
    assert [e["step"] for e in events(out, "step")] == list(range(1, steps + 1))


# --- F22


@pytest.mark.fault("F22", "three in a row")
def test_three_spikes_in_a_row_go_back_and_leave_their_rows_out(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    out, first = tmp_path / "run", [True]
    inner, back = Loop._loss, Loop._go_back

    def loss(self: Loop, step: int, micro: int, batch: Any) -> Any:
        return inner(self, step, micro, batch) * (1000.0 if first[0] and step + 1 in (20, 21, 22) else 1.0)

    def go_back(self: Loop) -> int:
        first[0] = False
        return back(self)

    monkeypatch.setattr(Loop, "_loss", loss)
    monkeypatch.setattr(Loop, "_go_back", go_back)
    train(little_spec(home, out=str(out), steps=24, checkpoint=CheckpointSpec(every_steps=6)))
    assert [(e["step"], e["reason"]) for e in events(out, "no_update")] == [(n, "loss spike") for n in (20, 21, 22)]
    (found,) = events(out, "rolled_back")
    assert (found["from_step"], found["to_step"]) == (22, 18)
    assert found["rows_left_out"] > 0
    assert [e["step"] for e in events(out, "step")] == list(range(1, 25))


# --- F40


@pytest.mark.fault("F40", "golden run goes on")
def test_a_run_that_version_0_1_0_left_unfinished_goes_on_from_its_step(tmp_path: Path, monkeypatch: Patch) -> None:
    """AdaLoRA with the best step kept: every file that such a run has. The model is made anew from its seed."""
    shutil.copytree(GOLDEN / "run-0.1.0", tmp_path / "run")
    shutil.copy(GOLDEN / "rows.csv", tmp_path)
    monkeypatch.chdir(tmp_path)
    little_model(Path("bert"))
    kept = {p.name: (p / "adapter.safetensors").read_bytes() for p in (tmp_path / "run" / "ckpt").iterdir()}
    assert set(kept) == {"step-00000002", "step-00000005"}
    heard = Heard()
    # Its data are read as they were then, or this would be refused; the model's files hold versions of libraries.
    result = resume("run", accept_drift=["model", "tokenizer"], listener=heard)
    (resumed,) = events(tmp_path / "run", "resumed")
    assert resumed["step"] == 5
    assert result.record.status == "finished"
    assert [e["step"] for e in events(tmp_path / "run", "step")] == list(range(1, 9))
    assert all(e["loss"] is not None for e in events(tmp_path / "run", "step"))
    assert len(Predictor("run").texts(["what is the moon bad bad bad"])) == 1


@pytest.mark.fault("F40", "newer")
def test_a_run_of_a_newer_version_is_refused_and_left_as_it_is(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(spec_of(home, out), stop_at=2)
    facts = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**facts, "version": 99}))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(IntegrityError, match=r"format version 99 is newer.*Update luthier"):
        resume(out)
    with pytest.raises(IntegrityError, match="newer"):
        Predictor(out)
    assert {p: p.read_bytes() for p in before} == before


# --- F63


def killed_while_it_merges(run: str) -> None:
    """In a child: killed in the middle of folding a tuning into the weights."""
    from luthier.surgery import Tuned

    tuned = Predictor(run).tuned
    inner, calls = torch.Tensor.copy_, [0]

    def copy_(self: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *given, **named)

    torch.Tensor.copy_ = copy_  # type: ignore[method-assign]
    assert isinstance(tuned, Tuned)
    tuned.merge()


@pytest.mark.fault("F63", "killed midway")
def test_a_merge_that_is_killed_leaves_base_and_tuning_as_they_were(
    template: Template, home: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train(spec_of(home, out))
    before = {p: p.read_bytes() for folder in (home / "bert", out) for p in folder.rglob("*") if p.is_file()}
    outcome = template.run(__file__, "killed_while_it_merges", {"run": str(out)})
    assert outcome.status == -signal.SIGKILL, outcome.output
    after = {p: p.read_bytes() for folder in (home / "bert", out) for p in folder.rglob("*") if p.is_file()}
    assert after == before
    model = Predictor(out).tuned.merge()  # and again, undisturbed
    assert all(p.isfinite().all() for p in model.parameters())
    assert run_digests(out)["tuning"]

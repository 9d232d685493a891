"""F12 to F14, F41: signals at every kind of moment, and a second process at the same run."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from little import at_call, little_spec

from luthier.core import Interrupted, Locked
from luthier.runs import RunFolder, durable
from luthier.runs.fault import Operation
from luthier.runs.spec import CheckpointSpec, EvalSpec, RunSpec
from luthier.testing import Template
from luthier.training.evaluate import Evaluator
from luthier.training.loop import Loop
from luthier.training.stop_signals import StopRequested, StopSignals
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path) -> RunSpec:
    return little_spec(home, steps=8, out=str(out), eval=EvalSpec(every=3), checkpoint=CheckpointSpec(every_steps=4))


@pytest.fixture(scope="session")
def whole(home: Path) -> dict[str, str]:
    train(spec_of(home, home / "whole"))
    return run_digests(home / "whole")


class SignalAt:
    """Sends a signal to this process before the k-th operation of a save."""

    def __init__(self, k: int, number: int) -> None:
        self.k, self.number, self.seen = k, number, 0

    def before(self, operation: Operation) -> None:
        if "save" in operation.scopes:
            self.seen += 1
            if self.seen == self.k:
                os.kill(os.getpid(), self.number)


@pytest.mark.fault("F14", "each signal")
@pytest.mark.fault("F12", "next micro-batch, exact resume")
@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 128 + signal.SIGUSR1)]
)
def test_a_signal_in_a_forward_pass_leaves_at_the_next_micro_batch_and_loses_nothing(
    name: str, code: int, home: Path, tmp_path: Path, monkeypatch: Patch, whole: dict[str, str]
) -> None:
    before = signal.getsignal(getattr(signal, name))
    calls = at_call(monkeypatch, Loop, "_loss", 8, lambda: os.kill(os.getpid(), getattr(signal, name)))
    with pytest.raises(Interrupted, match=r"nothing is lost. Go on with `luthier resume ") as caught:
        train(spec_of(home, tmp_path / "run"))
    assert caught.value.exit_code == code
    assert calls[0] == 8  # no further micro-batch was begun
    assert signal.getsignal(getattr(signal, name)) is before
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == whole


@pytest.mark.fault("F13", "during a save")
@pytest.mark.parametrize("k", [3, 12, 21])
def test_a_signal_during_a_save_lets_the_save_be_finished(
    k: int, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    listener = SignalAt(k, signal.SIGTERM)
    durable.install(listener)
    try:
        with pytest.raises(Interrupted) as caught:
            train(spec_of(home, tmp_path / "run"))
    finally:
        durable.uninstall(listener)
    assert caught.value.exit_code == 143
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == whole


@pytest.mark.fault("F13", "during an evaluation")
@pytest.mark.parametrize("k", [1, 2])  # the first is the trial before step 1
def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_makes_it(
    k: int, home: Path, tmp_path: Path, monkeypatch: Patch, whole: dict[str, str]
) -> None:
    with monkeypatch.context() as patched:
        at_call(patched, Evaluator, "_one", k, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted) as caught:
            train(spec_of(home, tmp_path / "run"))
    assert caught.value.exit_code == 143
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == whole


@pytest.mark.fault("F14", "ignored by the parent")
def test_a_signal_that_the_parent_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            signals.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_asking_is_no_error_that_a_handler_might_swallow() -> None:
    with StopSignals() as signals, pytest.raises(StopRequested):
        os.kill(os.getpid(), signal.SIGTERM)
        try:
            signals.check()
        except Exception:
            pytest.fail("caught as an error")


# --- in processes of their own


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)
    try:
        with Template(("torch", "little", "luthier.training")) as made:
            yield made
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def twice(home: str, out: str) -> None:
    """In a child: two signals at once in the middle of a step."""
    patch = pytest.MonkeyPatch()

    def both() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        print("still here")

    at_call(patch, Loop, "_loss", 8, both)
    train(spec_of(Path(home), Path(out)))


def once(home: str, out: str) -> None:
    """In a child: one signal."""
    at_call(pytest.MonkeyPatch(), Loop, "_loss", 8, lambda: os.kill(os.getpid(), signal.SIGTERM))
    train(spec_of(Path(home), Path(out)))


def until_the_end(home: str, out: str) -> None:
    """In a child: a whole run, or what is left of one."""
    if (Path(out) / "run.json").exists():
        resume(out)
    else:
        train(spec_of(Path(home), Path(out)))


def second(home: str, out: str) -> None:
    """In a child, while the parent holds the run."""
    resume(out)


@pytest.mark.fault("F13", "second signal")
def test_a_second_signal_leaves_at_once_and_the_run_resumes_to_the_bit(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    outcome = template.run(__file__, "twice", {"home": str(home), "out": str(tmp_path / "run")})
    assert outcome.status == 143, outcome.output
    assert "still here" not in outcome.output
    resume(tmp_path / "run")
    assert run_digests(tmp_path / "run") == whole


@pytest.mark.fault("F12", "exit code of the process")
def test_the_process_ends_with_143(template: Template, home: Path, tmp_path: Path) -> None:
    outcome = template.run(__file__, "once", {"home": str(home), "out": str(tmp_path / "run")})
    assert outcome.status == 143, outcome.output
    assert "Interrupted: stopped by signal 15" in outcome.output


@pytest.mark.fault("F41", "whole runs")
def test_a_second_process_at_the_same_run_is_refused_with_pid_and_host(
    template: Template, home: Path, tmp_path: Path
) -> None:
    """F41."""
    out = tmp_path / "run"
    train(spec_of(home, out), stop_at=2)
    with RunFolder.open(out):
        outcome = template.run(__file__, "second", {"home": str(home), "out": str(out)})
    assert outcome.status == Locked.exit_code == 5
    assert f"process {os.getpid()} on this host" in outcome.output


@pytest.mark.fault("F41", "dead holder")
@pytest.mark.fault("F01", "whole runs")
def test_the_lock_of_a_killed_process_is_taken_over(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "run"
    outcome = template.run(__file__, "until_the_end", {"home": str(home), "out": str(out)}, fault="save:40:kill")
    assert outcome.status == -signal.SIGKILL
    resume(out)
    assert run_digests(out) == whole
    assert [e for e in RunFolder.open(out, write=False).events() if e["event"] == "took_over_lock"]


@pytest.mark.fault("F01", "whole runs")
@pytest.mark.slow
@pytest.mark.parametrize("scope", ["create", "save", "prune", "event", "*"])
def test_a_run_killed_at_its_durable_operations_resumes_to_the_bit(
    scope: str, template: Template, home: Path, tmp_path: Path, whole: dict[str, str], record_property: Any
) -> None:
    """Every fifth operation of whole runs, not of single saves."""
    k, killed = 1, 0
    while True:
        out = tmp_path / f"run-{k}"
        given: dict[str, Any] = {"home": str(home), "out": str(out)}
        outcome = template.run(__file__, "until_the_end", given, fault=f"{scope}:{k}:kill")
        if outcome.status == 0:
            break
        assert outcome.status == -signal.SIGKILL, outcome.output
        killed += 1
        if not (out / "record.json").exists():  # else it was killed after its last rename: it is finished
            again = template.run(__file__, "until_the_end", given)
            assert again.status == 0, again.output
        assert run_digests(out) == whole
        k += 5
    assert killed >= 2
    record_property(f"counted: a whole run, every fifth operation of scope {scope}, SIGKILL", killed)


SCRIPT = """
import sys
from little import little_spec
from pathlib import Path
from luthier.workflow import train
from luthier.training import Listener

class Printed(Listener):
    def say(self, line):
        print(line)

result = train(little_spec(Path(sys.argv[1]), steps=3), listener=Printed())
print(result.record.status)
"""


@pytest.mark.fault("F62", "LANG=C, no HOME, no terminal, odd path")
def test_it_runs_in_a_bare_environment_and_a_folder_with_blanks_and_an_emoji(tmp_path: Path) -> None:
    """F62: LANG=C, no terminal, no HOME that can be written, no network asked for."""
    home = tmp_path / "my rüns 🎻"
    home.mkdir()
    closed = tmp_path / "file"
    closed.write_text("")
    environment = {
        "PATH": os.environ["PATH"], "LANG": "C", "LC_ALL": "C", "PYTHONPATH": str(TESTS), "HF_HUB_OFFLINE": "1",
        "HOME": str(closed / "none"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(home)], env=environment, stdin=subprocess.DEVNULL, capture_output=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert done.stdout.decode(errors="replace").strip().endswith("finished")

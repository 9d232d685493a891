"""The machine around a run: processes that stop or die, clocks that jump, memory and disks that are too small."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from faults import walls
from little import at_call, little_spec

from luthier.core import ConfigError, DiskFull, Locked, ResourceError
from luthier.runs import RunFolder, checkpoints, load_newest
from luthier.runs.lock import holder_is_dead, myself
from luthier.runs.spec import CheckpointSpec, EvalSpec, RunSpec
from luthier.testing import Template
from luthier.training.loop import Loop
from luthier.training.objective import Objective
from luthier.trust import jail
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path | None, **changes: Any) -> RunSpec:
    fields: dict[str, Any] = {"steps": 8, "eval": EvalSpec(every=3), "checkpoint": CheckpointSpec(every_steps=2)}
    return little_spec(home, **{**fields, **changes}, out=str(out) if out is not None else None)


@pytest.fixture(scope="session")
def whole(home: Path) -> dict[str, str]:
    train(spec_of(home, home / "whole"))
    return run_digests(home / "whole")


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(TESTS)
    try:
        with Template(("torch", "little", "faults.walls", "luthier.training")) as made:
            yield made
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def events(path: Path, kind: str) -> list[dict[str, Any]]:
    return [e for e in RunFolder.open(path, write=False).events() if e["event"] == kind]


# --- F15: a laptop that sleeps, a clock that is set


def stops_itself(home: str, out: str, said: str) -> None:
    """In a child: SIGSTOP in the middle of a step; a process beside it tries the run meanwhile, then lets it go on."""
    parent = os.getpid()

    def beside() -> None:
        if os.fork():
            os.kill(parent, signal.SIGSTOP)
            return
        try:
            while psutil.Process(parent).status() != psutil.STATUS_STOPPED:
                time.sleep(0.005)
            try:
                RunFolder.open(out).close()
                found = "taken"
            except Locked as error:
                found = str(error)
            Path(said).write_text(found)
        finally:
            os.kill(parent, signal.SIGCONT)
            os._exit(0)

    at_call(pytest.MonkeyPatch(), Loop, "_loss", 8, beside)
    train(spec_of(Path(home), Path(out)))
    os.wait()


@pytest.mark.fault("F15", "stopped and continued")
def test_a_stopped_run_keeps_its_lock_and_goes_on_as_if_nothing_had_been(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    given = {"home": str(home), "out": str(tmp_path / "run"), "said": str(tmp_path / "said")}
    outcome = template.run(__file__, "stops_itself", given)
    assert outcome.status == 0, outcome.output
    assert "is writing to this run folder" in (tmp_path / "said").read_text()
    assert run_digests(tmp_path / "run") == whole


def counted(patch: Patch, ticks: list[float]) -> list[int]:
    """Each step takes two seconds of the clock `ticks`; the steps at which the state was made safe."""
    inner_step, inner_save, saves = Loop._train_step, Loop.save, []

    def step(self: Loop, number: int, batches: Any) -> Any:
        ticks[0] += 2.0
        return inner_step(self, number, batches)

    def save(self: Loop) -> None:
        saves.append(self.step)
        inner_save(self)

    patch.setattr(Loop, "_train_step", step)
    patch.setattr(Loop, "save", save)
    return saves


@pytest.mark.fault("F15", "clock set back")
@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_neither_skips_nor_hurries_a_checkpoint(
    jump: float, home: Path, tmp_path: Path, monkeypatch: Patch, whole: dict[str, str]
) -> None:
    """Checkpoints by time count the monotonic clock: with a tick of it after every step, each step is saved."""
    saved: dict[str, list[int]] = {}
    for name, by in (("steady", 0.0), ("jumping", jump)):
        out, ticks, real = tmp_path / name, [0.0], time.time
        with monkeypatch.context() as patched:
            patched.setattr(time, "monotonic", lambda ticks=ticks: ticks[0])
            patched.setattr(time, "time", lambda ticks=ticks, by=by, real=real: real() + (by if ticks[0] > 7 else 0.0))
            saved[name] = counted(patched, ticks)
            train(spec_of(home, out, checkpoint=CheckpointSpec(every_seconds=3.0)))
        assert run_digests(out) == whole
    assert saved["steady"] == saved["jumping"] == [0, 2, 4, 6, 8, 8]


@pytest.mark.fault("F15", "lock after a clock step")
def test_a_clock_that_is_set_makes_no_living_holder_look_dead(tmp_path: Path, monkeypatch: Patch) -> None:
    """A start time in seconds since 1970 is computed from the boot's, which moves with the clock."""
    holder = json.loads(json.dumps(myself()))
    inner = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: inner(self) + 3600.0)
    assert not holder_is_dead(holder)
    assert holder_is_dead({**holder, "ticks": holder["ticks"] + 1})
    del holder["ticks"]  # of an older version: then only the seconds can be compared
    assert holder_is_dead(holder)
    RunFolder.create(tmp_path / "run", {"seed": 7}).close()
    (tmp_path / "run" / "run.lock").write_text(json.dumps({**myself(), "started": 0.0}))
    with pytest.raises(Locked):
        RunFolder.open(tmp_path / "run")


# --- F16: whoever started it is gone


def dies_with_a_child(said: str) -> None:
    """In a child: opens a jailed process, tells its number, and is killed."""
    child = jail.Child("operator:itemgetter", 0, what="x")
    Path(said).write_text(str(child._process.pid))
    os.kill(os.getpid(), signal.SIGKILL)


def gone(pid: int, within_s: float = 5.0) -> bool:
    """Whether a process ends by itself within so many seconds."""
    try:
        psutil.Process(pid).wait(within_s)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True


@pytest.mark.fault("F16", "parsers and templates")
def test_a_jailed_child_ends_when_its_owner_is_killed(template: Template, tmp_path: Path) -> None:
    outcome = template.run(__file__, "dies_with_a_child", {"said": str(tmp_path / "pid")})
    assert outcome.status == -signal.SIGKILL
    assert gone(int((tmp_path / "pid").read_text()))


DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
said, log, code = sys.argv[1:]
child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
Path(said).write_text(str(child.pid))
child.stdin.write(Path(said + ".toml").read_bytes())
child.stdin.close()
while not (Path(log).exists() and b'"step"' in Path(log).read_bytes()):
    assert child.poll() is None
    time.sleep(0.02)
os.kill(os.getpid(), 9)
"""


@pytest.mark.fault("F16", "a run of its own process")
def test_a_run_that_was_started_by_another_process_ends_with_it_and_resumes(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = spec_of(home, out, steps=100_000, eval=EvalSpec(every=0))
    (tmp_path / "pid.toml").write_text(spec.to_toml())
    code = "from luthier.cli._train_in_child import main; raise SystemExit(main())"
    words = [sys.executable, "-c", DRIVER, str(tmp_path / "pid"), str(out / "events.jsonl"), code]
    done = subprocess.run(words, capture_output=True, timeout=120, env={**os.environ, "PYTHONPATH": str(TESTS)})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert gone(int((tmp_path / "pid").read_text()))
    (event,) = events(out, "interrupted")
    resume(out, changed={"steps": event["step"] + 1})


# --- F18: memory that the kernel refuses, and a process that it kills


def with_little_memory(home: str, out: str, room: int, each: int) -> None:
    """In a child: only `room` more bytes of address space; each token of a micro-batch asks for `each` of them."""
    import resource

    inner = Objective.__call__

    def call(self: Objective, batch: Any) -> Any:
        hungry = torch.empty(batch.inputs["input_ids"].numel() * each, dtype=torch.uint8)
        result = inner(self, batch)
        del hungry
        return result

    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + room, resource.RLIM_INFINITY))
    Objective.__call__ = call  # type: ignore[method-assign]  # this process ends with the run
    train(spec_of(Path(home), Path(out), trunk_dropout="off", batch=wide()))


def wide() -> Any:
    from luthier.runs.spec import BatchSpec

    return BatchSpec(size=8, tokens=160, group_by_length=False)


@pytest.mark.fault("F18", "address space")
def test_a_real_refusal_of_memory_halves_the_micro_batch_and_keeps_the_steps(
    template: Template, home: Path, tmp_path: Path
) -> None:
    train(spec_of(home, tmp_path / "plain", trunk_dropout="off", batch=wide()))
    given = {"home": str(home), "out": str(tmp_path / "run"), "room": 1_500_000_000, "each": 15_000_000}
    outcome = template.run(__file__, "with_little_memory", given)
    assert outcome.status == 0, outcome.output
    assert events(tmp_path / "run", "out_of_memory")
    losses = [[e["loss"] for e in events(tmp_path / name, "step")] for name in ("plain", "run")]
    assert losses[1] == pytest.approx(losses[0], abs=1.5e-6)


@pytest.mark.fault("F18", "address space")
def test_a_row_that_the_kernel_refuses_ends_with_code_5_and_advice(
    template: Template, home: Path, tmp_path: Path
) -> None:
    given = {"home": str(home), "out": str(tmp_path / "run"), "room": 1_500_000_000, "each": 1_000_000_000}
    outcome = template.run(__file__, "with_little_memory", given)
    assert outcome.status == ResourceError.exit_code == 5, outcome.output
    assert "alone does not fit" in outcome.output and "max_length" in outcome.output


def killed_in_a_forward_pass(home: str, out: str) -> None:
    """In a child: what the kernel does to the process that it chooses when the machine's memory runs out."""
    at_call(pytest.MonkeyPatch(), Loop, "_loss", 14, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(spec_of(Path(home), Path(out)))


@pytest.mark.fault("F18", "killed by the kernel")
def test_a_run_that_the_kernel_killed_says_so_and_resumes_to_the_bit(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "run"
    outcome = template.run(__file__, "killed_in_a_forward_pass", {"home": str(home), "out": str(out)})
    assert outcome.status == -signal.SIGKILL
    assert len(checkpoints(RunFolder.open(out, write=False))) >= 2
    resume(out)
    assert len(events(out, "took_over_lock")) == 1
    assert run_digests(out) == whole


# --- F37: a launcher of several processes


@pytest.mark.fault("F37", "refused")
def test_several_ranks_are_refused_at_the_start_and_on_resume(home: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    train(spec_of(home, tmp_path / "run"), stop_at=2)
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is '2'.*one process.*torchrun"):
        train(spec_of(home, tmp_path / "other"))
    assert not (tmp_path / "other").exists()
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        resume(tmp_path / "run")
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before
    monkeypatch.setenv("WORLD_SIZE", "1")
    resume(tmp_path / "run")


# --- F08, F10: disks that are really full, or turned read-only


def on_a_small_disk(home: str, place: str, said: str, n_bytes: int) -> None:
    """In a child: a disk of its own that somebody else fills up before the fourth save; then a resume with room."""
    walled = walls.namespaces("mount") and walls.mount_tmpfs(place, n_bytes)
    out, ended = Path(place) / "run", ""

    def fill() -> None:
        with contextlib.suppress(OSError), (Path(place) / "ballast").open("wb", buffering=0) as file:
            while walled:
                file.write(bytes(4096))

    try:
        with pytest.MonkeyPatch.context() as patched:
            at_call(patched, Loop, "save", 4, fill)
            train(spec_of(Path(home), out))
    except DiskFull as error:
        ended = str(error)
    found: dict[str, Any] = {"walled": walled, "ended": ended}
    if walled and ended:
        run = RunFolder.open(out, write=False)
        checkpoint, skipped = load_newest(run)
        found |= {"step": checkpoint.step if checkpoint else None, "skipped": len(skipped)}
        found["left"] = [p.name for p in run.ckpt.iterdir() if p.name.startswith(".tmp-")]
        (Path(place) / "ballast").unlink()
        resume(out)
        found["digests"] = run_digests(out)
    Path(said).write_text(json.dumps(found))


@pytest.mark.fault("F08", "a disk that is really full")
def test_a_disk_that_is_really_full_leaves_the_last_checkpoint_and_the_run_resumes(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    given = {"home": str(home), "place": str(place), "said": str(tmp_path / "said"), "n_bytes": 40_000_000}
    outcome = template.run(__file__, "on_a_small_disk", given)
    assert outcome.status == 0, outcome.output
    found = json.loads((tmp_path / "said").read_text())
    if not found["walled"]:  # no disk of its own here: then it had room, and the faults of test_loop_disk.py remain
        assert found["ended"] == ""
        return
    assert found["digests"] == whole
    assert "run" in found["ended"]
    assert (found["step"], found["skipped"], found["left"]) == (4, 0, [])


def on_a_disk_that_turns_read_only(home: str, place: str, said: str) -> None:
    """In a child: the kernel turns the disk read-only before the fourth save, as after an error of the disk."""
    walled = walls.namespaces("mount") and walls.mount_tmpfs(place, 40_000_000)
    out, ended = Path(place) / "run", ""

    def turn() -> None:
        assert not walled or walls.remount(place, read_only=True)

    try:
        with pytest.MonkeyPatch.context() as patched:
            at_call(patched, Loop, "save", 4, turn)
            train(spec_of(Path(home), out))
    except ResourceError as error:
        ended = str(error)
    found: dict[str, Any] = {"walled": walled, "ended": ended, "tuning": (out / "tuning").exists()}
    if walled:
        walls.remount(place, read_only=False)
        resume(out)
        found["digests"] = run_digests(out)
    Path(said).write_text(json.dumps(found))


@pytest.mark.fault("F10", "turned read-only")
def test_a_disk_that_turns_read_only_ends_the_run_without_a_result_and_it_resumes(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    place = tmp_path / "disk"
    place.mkdir()
    given = {"home": str(home), "place": str(place), "said": str(tmp_path / "said")}
    outcome = template.run(__file__, "on_a_disk_that_turns_read_only", given)
    assert outcome.status == 0, outcome.output
    found = json.loads((tmp_path / "said").read_text())
    assert found["tuning"] is not found["walled"]  # no disk of its own here: then it finishes
    if found["walled"]:
        assert "read-only" in found["ended"].lower()
        assert found["digests"] == whole


# --- F42: eight starts at once


def eight_at_once(home: str, here: str, outs: list[str]) -> None:
    """In a child: forks that train at the same moment, each told its folder ("" for one that it finds itself)."""
    os.chdir(here)
    ready, go = os.pipe()
    pids = []
    for i, out in enumerate(outs):
        pid = os.fork()
        if pid == 0:
            os.close(go)
            os.read(ready, 1)  # ends when the parent closes it
            status = 1
            try:
                result = train(spec_of(Path(home), Path(out) if out else None))
                Path(f"said-{i}").write_text(str(result.path))
                status = 0
            except (Locked, ConfigError, ResourceError) as error:
                Path(f"said-{i}").write_text(f"{type(error).__name__}: {error}")
                status = error.exit_code
            finally:
                os._exit(status)
        pids.append(pid)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    Path("codes").write_text(json.dumps(codes))


@pytest.mark.fault("F42", "one data set, eight starts")
def test_eight_starts_at_once_make_eight_equal_runs(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    given = {"home": str(home), "here": str(tmp_path), "outs": [""] * 8}
    outcome = template.run(__file__, "eight_at_once", given, timeout_s=120)
    assert outcome.status == 0, outcome.output
    said = [(tmp_path / f"said-{i}").read_text() for i in range(8)]
    assert json.loads((tmp_path / "codes").read_text()) == [0] * 8, said
    assert len(set(said)) == 8
    assert all(run_digests(Path(tmp_path / path)) == whole for path in said)
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.fault("F42", "one folder, eight starts")
@pytest.mark.fault("F41", "whole runs")
def test_of_eight_starts_in_one_folder_one_trains_and_the_others_are_told(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    given = {"home": str(home), "here": str(tmp_path), "outs": [str(tmp_path / "run")] * 8}
    outcome = template.run(__file__, "eight_at_once", given, timeout_s=120)
    assert outcome.status == 0, outcome.output
    codes, said = json.loads((tmp_path / "codes").read_text()), [(tmp_path / f"said-{i}").read_text() for i in range(8)]
    assert codes.count(0) == 1, said
    assert all(
        "run" in line and line.split(":")[0] in ("ConfigError", "Locked")
        for line, code in zip(said, codes, strict=True)
        if code
    )
    assert run_digests(tmp_path / "run") == whole
    assert not list(tmp_path.glob(".tmp-*"))


# --- F62: a bare machine


def behind_walls(home: str, out: str, said: str) -> None:
    """In a child: no network but a loopback that is down, /dev/shm read-only, and a hook that hears every attempt."""
    heard: list[str] = []
    walled = walls.namespaces("network", "mount") and walls.read_only("/dev/shm")
    walls.listen(heard)
    train(spec_of(Path(home), Path(out)))
    Path(said).write_text(json.dumps({"walled": walled, "heard": heard}))


@pytest.mark.fault("F62", "no network, no port", "no /dev/shm")
def test_training_opens_no_socket_and_needs_no_shared_memory(
    template: Template, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    given = {"home": str(home), "out": str(tmp_path / "run"), "said": str(tmp_path / "said")}
    outcome = template.run(__file__, "behind_walls", given)
    assert outcome.status == 0, outcome.output
    assert json.loads((tmp_path / "said").read_text())["heard"] == []
    assert run_digests(tmp_path / "run") == whole


def speaks_to_the_world(said: str) -> None:
    """In a child: what the walls above must hear."""
    import socket

    heard: list[str] = []
    walls.listen(heard)
    with socket.socket() as spoken, contextlib.suppress(OSError):
        spoken.connect(("127.0.0.1", 9))
    with contextlib.suppress(OSError):
        Path("/dev/shm/luthier-canary").read_bytes()
    Path(said).write_text(json.dumps(heard))


def test_the_walls_hear_what_they_should(template: Template, tmp_path: Path) -> None:
    outcome = template.run(__file__, "speaks_to_the_world", {"said": str(tmp_path / "said")})
    assert outcome.status == 0, outcome.output
    heard = json.loads((tmp_path / "said").read_text())
    assert any(h.startswith("socket.connect") for h in heard) and any("/dev/shm" in h for h in heard)

"""F41: one writer per run folder. F46: a log that is torn at any byte loses nothing that was finished."""

import json
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from luthier import DataSpec, RunSpec, train
from luthier.core import ConfigError, Locked, ResourceError
from luthier.runs import Journal, RunFolder, durable, lock, store
from luthier.runs.lock import _ticks, holder_is_dead, myself
from luthier.testing import Template, count_ops, installed


def open_and_write(folder: str) -> None:
    with RunFolder.open(folder) as run:
        run.event("second_was_here")


def die_with_the_lock(folder: str) -> None:
    run = RunFolder.open(folder)
    run.event("step", lasting=False, step=1)
    os.kill(os.getpid(), signal.SIGKILL)


def die_and_leave_a_child(folder: str) -> None:
    """A data worker outlives its killed parent."""
    RunFolder.open(folder)  # not closed: this process is killed with it
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(tell, b"x")
        signal.pause()
    os.read(ready, 1)
    (Path(folder).parent / "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with Template() as made:
        yield made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    RunFolder.create(tmp_path / "run", {"seed": 7}).close()
    return tmp_path / "run"


@pytest.mark.fault("F41", "store")
def test_f41_a_second_process_is_refused_with_pid_and_host(template: Template, folder: Path) -> None:
    with RunFolder.open(folder):
        outcome = template.run(__file__, "open_and_write", {"folder": str(folder)})
        assert outcome.status == Locked.exit_code
        assert f"process {os.getpid()} on this host, {socket.gethostname()}" in outcome.output
    assert "second_was_here" not in [line["event"] for line in RunFolder.open(folder, write=False).events()]
    assert template.run(__file__, "open_and_write", {"folder": str(folder)}).status == 0


def test_f41_the_same_process_is_refused_too(folder: Path) -> None:
    with RunFolder.open(folder), pytest.raises(Locked, match=str(os.getpid())):
        RunFolder.open(folder)


def test_f41_reading_needs_no_lock(folder: Path) -> None:
    with RunFolder.open(folder):
        reader = RunFolder.open(folder, write=False)
        assert [line["event"] for line in reader.events()] == ["created"]
        with pytest.raises(ResourceError, match="opened for reading"):
            reader.event("no")


@pytest.mark.fault("F41", "dead holder")
def test_f41_the_lock_of_a_killed_process_is_taken_over_and_recorded(template: Template, folder: Path) -> None:
    outcome = template.run(__file__, "die_with_the_lock", {"folder": str(folder)})
    assert outcome.status == -signal.SIGKILL, outcome.output
    left = json.loads((folder / "run.lock").read_bytes())
    with RunFolder.open(folder) as run:
        taken = [line["holder"] for line in run.events() if line["event"] == "took_over_lock"]
        assert taken == [left]
        assert run.journal.rows() == [{"event": "step", "step": 1}], "a row survives a kill without an fsync"


def test_f41_a_worker_that_outlives_the_killed_holder_does_not_keep_the_lock(template: Template, folder: Path) -> None:
    outcome = template.run(__file__, "die_and_leave_a_child", {"folder": str(folder)})
    assert outcome.status == -signal.SIGKILL, outcome.output
    child = int((folder.parent / "child").read_text())
    try:
        os.kill(child, 0)  # it lives
        RunFolder.open(folder).close()
    finally:
        os.kill(child, signal.SIGKILL)


def with_holder(folder: Path, **changes: object) -> None:
    (folder / "run.lock").write_bytes(durable.encode({**myself(), **changes}))


def of_process(pid: int) -> dict[str, Any]:
    """What another process would have written of itself."""
    return {"pid": pid, "started": psutil.Process(pid).create_time(), "ticks": _ticks(pid)}


def test_f41_a_living_holder_is_respected_where_flock_says_nothing(folder: Path) -> None:
    with_holder(folder, **of_process(os.getppid()))
    with pytest.raises(Locked, match=str(os.getppid())):
        RunFolder.open(folder)


@pytest.mark.fault("F41", "dead holder")
def test_f41_a_pid_used_again_by_another_process_is_proof_of_death(folder: Path) -> None:
    with_holder(folder, ticks=myself()["ticks"] - 100)
    RunFolder.open(folder).close()
    with_holder(folder, started=myself()["started"] - 100, ticks=None)  # where the kernel gives no ticks
    RunFolder.open(folder).close()


def test_f41_a_restart_of_the_host_is_proof_of_death(folder: Path) -> None:
    with_holder(folder, boot="another")
    RunFolder.open(folder).close()


def test_f41_nothing_proves_that_a_holder_on_another_host_is_dead(folder: Path) -> None:
    with_holder(folder, boot="another", host="elsewhere", pid=12)
    with pytest.raises(Locked, match=r"process 12 on elsewhere .* delete .*run\.lock"):
        RunFolder.open(folder)
    RunFolder.open(folder, take_over=True).close()
    RunFolder.open(folder).close()


def test_a_lock_that_was_torn_while_it_was_written_is_free(folder: Path) -> None:
    (folder / "run.lock").write_bytes(durable.encode(myself())[:17])
    RunFolder.open(folder).close()


def test_this_process_is_not_dead() -> None:
    assert not holder_is_dead(myself())
    assert holder_is_dead({**myself(), "pid": 2**22 + 1})


# --- F46 -------------------------------------------------------------------------------------------------------------


def test_f46_a_log_cut_at_every_byte_keeps_every_finished_line(folder: Path, tmp_path: Path) -> None:
    with RunFolder.open(folder) as run:
        for step in range(3):
            run.event("step", lasting=False, step=step, loss=0.1 * step, text="naïve ✓ \n")
        run.event("evaluated", score=0.5)
    content = (folder / "events.jsonl").read_bytes()
    lines = [json.loads(line) for line in content.splitlines()]
    for length in range(len(content) + 1):
        torn = tmp_path / "torn.jsonl"
        torn.write_bytes(content[:length])
        n_whole = content[:length].count(b"\n")
        journal = Journal(torn)
        before = journal.replay()
        assert before.lines == lines[:n_whole]
        assert before.bad == []
        assert before.torn_bytes == length - (content[:length].rfind(b"\n") + 1)
        journal.append({"event": "after"}, fact=False)
        journal.close()
        assert journal.cut_bytes == before.torn_bytes
        assert journal.replay().lines == [*lines[:n_whole], {"event": "after"}]
        assert journal.replay().torn_bytes == 0


def test_f46_a_torn_tail_is_reported_when_the_run_is_opened(folder: Path) -> None:
    with (folder / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "half')
    with RunFolder.open(folder) as run:
        assert [(e["file"], e["bytes"]) for e in run.events() if e["event"] == "torn_tail_cut"] == [
            ("events.jsonl", 15)
        ]


def test_f46_a_full_disk_in_the_middle_of_a_line_leaves_no_half_line(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        with installed("event:1:enospc"), pytest.raises(ResourceError, match="no space left"):
            run.event("lost", value=1)
        run.event("kept", value=2)
    replay = RunFolder.open(folder, write=False).journal.replay()
    assert [line["event"] for line in replay.lines] == ["created", "kept"]
    assert replay.bad == []


def test_a_line_that_is_damaged_in_the_middle_is_reported_and_the_others_are_read(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n{"a": \xff}\n[2]\n{"a": 3}\n')
    replay = Journal(tmp_path / "log.jsonl").replay()
    assert replay.lines == [{"a": 1}, {"a": 3}]
    assert [number for number, _ in replay.bad] == [2, 3]


def test_rows_after_a_checkpoint_are_written_again_to_the_byte(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        for step in range(6):
            run.event("step", lasting=False, step=step, at_rows=[step, step + 1])
            if step == 4:
                run.event("saved", step=4, note='not a row: "at": "x"')
        undisturbed = run.journal.rows()
        assert run.truncate_events(after=3) == 3
        assert run.n_rows() == 3
        for step in range(3, 6):
            run.event("step", lasting=False, step=step, at_rows=[step, step + 1])
        assert run.journal.rows() == undisturbed
        assert [line["step"] for line in run.events() if line["event"] == "saved"] == [4], "facts stay"
        assert run.truncate_events(after=6) == 0


def test_rows_that_are_missing_are_recorded(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.event("step", lasting=False, step=0)
        assert run.truncate_events(after=4) == 0
        assert [e["missing"] for e in run.events() if e["event"] == "rows_missing"] == [3]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), {1, 2}])
def test_a_value_that_json_cannot_hold_is_refused(folder: Path, value: object) -> None:
    with RunFolder.open(folder) as run, pytest.raises(ConfigError, match="plain values"):
        run.event("step", value=value)


def test_a_row_must_not_look_like_a_fact(folder: Path) -> None:
    with RunFolder.open(folder) as run, pytest.raises(ConfigError, match="field 'at'"):
        run.event("step", lasting=False, at=3)


def test_a_row_costs_one_write_and_a_fact_lasts_at_once(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        assert [o.kind for o in count_ops(lambda: run.event("step", lasting=False, step=1))] == ["append"]
        assert [o.kind for o in count_ops(lambda: run.event("saved", step=1))] == ["append", "fsync"]
        run.event("step", lasting=False, step=2)
        assert [o.kind for o in count_ops(run.flush)] == ["fsync"]
        assert count_ops(run.flush) == []


# --- creating and opening --------------------------------------------------------------------------------------------


def test_creating_over_an_unfinished_run_says_how_to_resume(folder: Path) -> None:
    with pytest.raises(ConfigError, match=rf"unfinished run. Continue it with `luthier resume {folder}`"):
        RunFolder.create(folder, {})


def test_creating_over_a_finished_run_asks_for_another_out(folder: Path) -> None:
    with RunFolder.open(folder) as run:
        run.write_json("record.json", {"status": "finished"})
        assert run.finished
    with pytest.raises(ConfigError, match=r"finished run\. Choose another --out"):
        RunFolder.create(folder, {})


def test_creating_over_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no run"):
        RunFolder.create(tmp_path, {})
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.create(tmp_path / "thesis.txt", {})
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_f10_a_folder_that_cannot_be_made_is_refused_before_any_work() -> None:
    with pytest.raises(ResourceError, match="/proc/nobody-can-write-here"):
        RunFolder.create("/proc/nobody-can-write-here/run", {})


def test_a_place_where_no_folder_can_be_made_is_refused_before_rows_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    rows = DataSpec(source=str(tmp_path / "no-such-rows.csv"))
    spec = RunSpec(model=str(tmp_path), data=rows, out=str(tmp_path / "thesis.txt" / "runs" / "x"))
    with pytest.raises(ResourceError, match=r"thesis\.txt is a file, and no folder can stand in it"):
        train(spec)
    monkeypatch.setattr("luthier.core.places.os.access", lambda *asked: False)
    with pytest.raises(ResourceError, match=f"this user may not write to {tmp_path}, "):
        train(replace(spec, out=str(tmp_path / "runs" / "x")))


def test_opening_what_is_no_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no run\.json"):
        RunFolder.open(tmp_path)


def test_a_run_folder_is_private_and_can_be_read_without_the_code(folder: Path) -> None:
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.rglob("*"))
    text = (folder / "README.txt").read_text()
    for name in ("run.json", "spec.toml", "environment.json", "events.jsonl", "rows.jsonl"):
        assert name in text
        assert (folder / name).exists()


def test_run_json_is_never_rewritten_and_drift_gets_its_own_file(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", {"seed": 7}, fingerprints={"data": "aa", "base": "cc"}) as run:
        before = (run.path / "run.json").read_bytes()
        with pytest.raises(ConfigError, match="never rewritten"):
            run.write_json("run.json", {})
        run.accept_drift(["data aa -> bb"], {"data": "bb"}, step=12)
        run.accept_drift(["data bb -> dd"], {"data": "dd"}, step=15)
        assert run.fingerprints == {"data": "dd", "base": "cc"}
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    assert [d["step"] for d in RunFolder.open(tmp_path / "run", write=False).drifts()] == [12, 15]


def test_a_folder_with_blanks_and_signs_in_its_name_works(tmp_path: Path) -> None:
    path = tmp_path / "my run ✓ [1]" / "ünïcode"
    shutil.rmtree(path, ignore_errors=True)
    with RunFolder.create(path, {"text": "✓"}) as run:
        run.event("said", text="✓")
    assert RunFolder.open(path, write=False).spec == {"text": "✓"}


def test_when_another_process_makes_the_run_first_the_refusal_says_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, environment = tmp_path / "run", store.environment

    def other_is_faster(*args: Any) -> dict[str, Any]:
        path.mkdir()
        (path / "run.json").write_text("{}")
        return environment(*args)

    monkeypatch.setattr(store, "environment", other_is_faster)
    with pytest.raises(ConfigError, match="holds an unfinished run"):
        RunFolder.create(path, {"seed": 7})
    assert (path / "run.json").read_text() == "{}"


def test_a_child_of_a_child_does_not_close_a_file_that_got_the_number_of_the_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fd = os.open(os.devnull, os.O_RDONLY)
    monkeypatch.setattr(lock, "_held", {fd})
    lock._forget_in_child()
    again = os.open(os.devnull, os.O_RDONLY)  # the system gives the lowest free number
    assert again == fd
    lock._forget_in_child()
    os.close(again)  # raises if it is closed already


def test_rows_of_a_log_that_is_not_there_yet_are_all_missing(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "rows.jsonl")
    assert journal.keep_rows(2) == (0, 2)
    journal.close()

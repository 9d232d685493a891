"""Runs are followed while another process writes them; a look reads what is new and changes nothing."""

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from little import little_spec
from report.planted import plant_run

from luthier.cli._main import main
from luthier.core import ConfigError, LuthierError
from luthier.report import Follower
from luthier.runs.ledger import Entry, Ledger
from luthier.runs.lock import myself
from luthier.runs.spec import BatchSpec
from luthier.workflow import train


def running(path: Path, steps: int = 5) -> Path:
    """A run of this process that has made some of its 200 steps."""
    run = plant_run(path, method="lora", seed=2, texts=["a"], wanted=["x"], said=["x"])
    (run / "record.json").rename(run / ".tmp-record")
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[: 1 + steps]))
    (run / "run.lock").write_text(json.dumps(myself()))
    return run


def add(run: Path, *lines: dict[str, Any], torn: str = "") -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines) + torn)


def test_a_look_shows_what_is_new_and_an_end_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = running(tmp_path / "one")
    before = {p.name: p.stat().st_mtime_ns for p in run.iterdir()}
    follower = Follower(tmp_path)
    clock = iter([100.0, 110.0, 120.0, 130.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    (first,) = follower.look()
    assert (first.state, first.step, first.total, first.left) == ("running", 5, 200, None)
    assert not follower.ended([first])
    add(run, {"event": "step", "step": 6, "loss": 0.5}, torn='{"event": "step", "st')
    (second,) = follower.look()
    assert (second.step, second.left) == (6, 194 * 10.0)
    add(run, torn='ep": 7, "loss": 0.25}\n')
    assert follower.look()[0].step == 7
    add(
        run,
        {"event": "scores", "step": 7, "accuracy": 0.5},
        {"event": "diverged", "step": 8, "reason": "nan", "at": "x"},
    )
    (run / "run.lock").write_text("")
    (last,) = follower.look()
    assert last.state == "diverged" and last.scores == {"accuracy": 0.5} and follower.ended([last])
    after = {p.name: p.stat().st_mtime_ns for p in run.iterdir() if p.name not in ("events.jsonl", "run.lock")}
    assert after == {name: t for name, t in before.items() if name in after}


def test_the_steps_of_epochs_are_those_that_are_made(tmp_path: Path) -> None:
    changes = {"steps": None, "epochs": 2.0, "batch": BatchSpec(size=8, tokens=48, accumulate=2)}
    train(little_spec(tmp_path, "bitfit", **changes), progress=False)
    (one,) = Follower(tmp_path / "run").look()
    assert one.total == one.step > 5


def test_steps_that_are_not_known_yet_are_known_once_rows_are(tmp_path: Path) -> None:
    train(little_spec(tmp_path, "bitfit", steps=None, epochs=1.0), progress=False)
    run = tmp_path / "run"
    for name in ("rows.jsonl", "events.jsonl"):
        (run / name).rename(tmp_path / name)
    follower = Follower(run)
    assert follower.look()[0].total is None
    for name in ("rows.jsonl", "events.jsonl"):
        (tmp_path / name).rename(run / name)
    assert follower.look()[0].total == 5


def test_rows_that_a_resumed_run_writes_again_are_not_counted_twice(tmp_path: Path) -> None:
    run = running(tmp_path / "one", steps=9)
    follower = Follower(run)
    assert follower.look()[0].step == 9
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    (run / "events.jsonl").write_text("".join(lines[:4]))
    (again,) = follower.look()
    assert again.step == 3 and len(again.curve) == 3


def test_a_killed_run_says_how_to_go_on(tmp_path: Path) -> None:
    run = running(tmp_path / "one")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run / "run.lock").write_text(json.dumps({**myself(), "pid": dead.pid}))
    (one,) = Follower(run).look()
    assert one.state == "killed" and "luthier resume" in one.why


def test_without_a_terminal_one_look_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    running(tmp_path / "a")
    plant_run(tmp_path / "b", method="ia3", seed=0, texts=["a"], wanted=["x"], said=["x"])
    assert main(["watch", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "running" in out and "5/200" in out and "2 runs: 1 running, 1 finished" in out
    assert main(["watch", str(tmp_path), "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["ended"] is False and [r["step"] for r in told["runs"]] == [5, 200]
    (tmp_path / "none").mkdir()
    assert main(["watch", str(tmp_path / "none")]) == 0
    assert "no run has begun here" in capfd.readouterr().out
    with pytest.raises(ConfigError, match="is no folder"):
        Follower(tmp_path / "nowhere")


def test_in_a_terminal_it_follows_until_the_run_has_ended(tmp_path: Path) -> None:
    run = running(tmp_path / "one")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "luthier", "watch", str(run), "--every", "0.2"]
    process = subprocess.Popen(words, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "COLUMNS": "100"})
    os.close(theirs)
    seen = b""
    end = time.monotonic() + 120
    done = False
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.5)[0]:
            try:
                seen += os.read(ours, 65536)
            except OSError:  # its other end is closed
                break
        if not done and b"5/200" in seen:
            assert b"running" in seen
            add(run, {"event": "finished", "step": 200, "at": "x"})
            (run / ".tmp-record").rename(run / "record.json")
            (run / "run.lock").write_text("")
            done = True
    os.close(ours)
    assert process.wait(30) == 0 and done
    assert b"1 run: 1 finished" in seen


def test_a_run_whose_strategy_chooses_its_rows_says_itself_how_many_steps_there_are(tmp_path: Path) -> None:
    train(little_spec(tmp_path, "bitfit", steps=None, epochs=1.0, strategy="llrd"), progress=False)
    (one,) = Follower(tmp_path / "run").look()
    assert one.total == one.step == 5


def test_the_cells_of_a_ledger_are_there_before_they_begin(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(tmp_path, make=True)
    ids = [str(i) * 64 for i in range(4)]
    ledger.add([Entry(id=id, spec={"method": "lora", "seed": 1}, run=f"cells/{id[0]}", order=int(id[0])) for id in ids])
    running(tmp_path / "cells" / "0")
    claims = {id: ledger.claim(id) for id in ids[:3]}
    assert all(claims.values())
    ledger.fail(claims[ids[1]], "no such file", 3)  # type: ignore[arg-type]
    assert {one.run: one.state for one in Follower(tmp_path).look()} == {
        "0": "running", "1": "failed", "2": "running", "3": "waiting"
    }  # fmt: skip
    assert main(["watch", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert "2 running" in said and "1 failed" in said and "1 waiting" in said and "1: no such file" in said


@pytest.mark.parametrize(
    ("told", "said"), [('{"format": "luthier-ledger", "version": 99}', "newer"), ("{", "cannot be read")]
)
def test_a_ledger_that_cannot_be_read_is_said_and_one_that_is_not_there_may_come(
    told: str, said: str, tmp_path: Path
) -> None:
    follower = Follower(tmp_path)
    assert follower.look() == []
    (tmp_path / "ledger").mkdir()
    (tmp_path / "ledger" / "ledger.json").write_text(told)
    with pytest.raises(LuthierError, match=said):
        follower.look()

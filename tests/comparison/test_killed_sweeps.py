"""A sweep whose processes are ended, at planned places and from outside, gives the table of an undisturbed one."""

import json
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from races import base_in, here

from luthier.comparison import compare, entrant_of, statistics
from luthier.comparison import run as run_file
from luthier.core.config import read_word
from luthier.runs.forkserver import Template
from luthier.runs.spec import RunSpec
from luthier.testing import count_ops


def race(home: Path, base: RunSpec, **more: object) -> bytes:
    statistics.DRAWS = 100
    entrants = [entrant_of(name, read_word) for name in ("bitfit", "lora:rank=2")]
    compare(base, entrants, seeds=2, home=home, **more)  # type: ignore[arg-type]
    return (home / "table.csv").read_bytes()


def drive(folder: str, home: str) -> None:
    """One driver that computes its cells itself, to be called in a fork."""
    run_file.engine_named = here([])  # type: ignore[assignment]
    race(Path(home), base_in(Path(folder)))


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "DRAWS", 100)
    monkeypatch.setattr(run_file, "engine_named", here([]))


@pytest.mark.usefixtures("few_draws")
def test_a_driver_that_is_killed_anywhere_goes_on_and_computes_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, undisturbed = base_in(tmp_path), list[bytes]()
    operations = count_ops(lambda: undisturbed.append(race(tmp_path / "whole", base)))
    claims = [
        k for k, o in enumerate(operations, 1) if o.kind == "link" and o.target and o.target.parent.name == "claims"
    ]
    commits = [
        k for k, o in enumerate(operations, 1) if o.kind == "link" and o.target and o.target.parent.name == "results"
    ]
    saves = [k for k, o in enumerate(operations, 1) if "save" in o.scopes]
    assert len(claims) == len(commits) == 4
    home = tmp_path / "killed"
    places = (claims[0], claims[0] + 1, saves[len(saves) // 2], commits[0] + 1)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]))
    with Template(("torch", "luthier.workflow", "luthier.methods", "luthier.comparison")) as template:
        done = 0
        for place in places:
            words = {"folder": str(tmp_path), "home": str(home)}
            outcome = template.run(__file__, "drive", words, fault=f"*:{place}:kill")
            assert outcome.status in (0, -signal.SIGKILL), outcome.output
            now = sorted(p.name for p in (home / "ledger" / "results").glob("*.json"))
            assert len(now) >= done, "what was finished stays so"
            done = len(now)
        outcome = template.run(__file__, "drive", {"folder": str(tmp_path), "home": str(home)})
        assert outcome.status == 0, outcome.output
    assert (home / "table.csv").read_bytes() == undisturbed[0]
    for result in (home / "ledger" / "results").glob("*.json"):
        assert len(list(result.parent.glob(f"{result.stem}*"))) == 1


@pytest.mark.slow
def test_processes_that_are_ended_or_hang_leave_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, home = base_in(tmp_path), tmp_path / "ended"
    over, done = threading.Event(), list[str]()

    def trouble() -> None:
        """To the first run SIGKILL, the second is stopped, the third loses the process that it was forked from."""
        struck: set[str] = set()
        while not over.wait(0.05):
            for path in (home / "ledger" / "claims").glob("*.1"):
                if path.stem in struck or len(struck) == 3:
                    continue
                number = (signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)[len(struck)]
                try:
                    pid = _child_of(os.getpid())
                    if pid is None:
                        continue
                    os.kill(_parent_of(pid) if len(struck) == 2 else pid, number)
                except (ProcessLookupError, psutil.NoSuchProcess):
                    continue  # it has ended meanwhile: the next look finds another
                struck.add(path.stem)
                done.append(number.name)
                time.sleep(0.3)

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        disturbed = race(home, base, lease=3.0)
    finally:
        over.set()
        thread.join()
    assert done == ["SIGKILL", "SIGSTOP", "SIGKILL"]
    monkeypatch.setattr(run_file, "engine_named", here([]))
    assert disturbed == race(tmp_path / "whole", base)


def _child_of(driver: int) -> int | None:
    """The run at work: a fork of a fork server that this process has started."""
    for server in psutil.Process(driver).children():
        with_runs = [c for c in server.children() if "forkserver" in " ".join(server.cmdline())]
        if with_runs:
            return int(with_runs[0].pid)
    return None


def _parent_of(pid: int) -> int:
    return int(psutil.Process(pid).ppid())


@pytest.mark.slow
def test_tasks_of_ray_of_which_one_is_killed_leave_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find_spec("ray") is not None and "ray" not in sys.modules, "its token is read as it is imported"
    base, home = base_in(tmp_path), tmp_path / "ray"
    over, struck = threading.Event(), list[int]()

    def trouble() -> None:
        while not over.wait(0.05) and not struck:
            for path in (home / "ledger" / "claims").glob("*.1"):
                holder = json.loads(path.read_bytes())["pid"]
                assert holder != os.getpid(), "a task works in a process of Ray"
                os.kill(holder, signal.SIGKILL)
                struck.append(holder)
                break

    thread = threading.Thread(target=trouble)
    thread.start()
    try:
        made = race(home, base, engine="ray")
    finally:
        over.set()
        thread.join()
    assert struck
    monkeypatch.setattr(run_file, "engine_named", here([]))
    assert made == race(tmp_path / "whole", base)

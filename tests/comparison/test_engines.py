"""Who computes cells: an error of a task reaches the user in its own words, and an idle worker looks less often."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.comparison.cells import Entrant, Sweep, cells_of
from luthier.comparison.choices import one_of
from luthier.comparison.engines import Local
from luthier.comparison.ray_engine import RayEngine
from luthier.comparison.worker import MOST_POLL, POLL, Worker
from luthier.core import ConfigError, ResourceError, UsageError
from luthier.runs.forkserver import Outcome, Template
from luthier.runs.ledger import MOST_ATTEMPTS, Entry, Ledger
from luthier.runs.spec import DataSpec, RunSpec


class Died(Exception):
    pass


class Dead(Exception):
    pass


class OfATask(Exception):
    def __init__(self, cause: Exception) -> None:
        super().__init__(f"ray::_one() (pid=7)\n  File ...\n{cause}")
        self.cause = cause


def engine(ledger: Ledger, ended: list[Any]) -> RayEngine:
    """One whose Ray is a list of what its tasks end with."""

    def get(task: int) -> Any:
        if isinstance(ended[task], Exception):
            raise ended[task]
        return ended[task]

    names = ("NodeDiedError", "OutOfMemoryError", "TaskCancelledError", "OwnerDiedError", "ObjectLostError")
    wrongs = {name: type(name, (Exception,), {}) for name in names}
    made = RayEngine.__new__(RayEngine)
    made.ray = SimpleNamespace(
        get=get, wait=lambda tasks, **_: (tasks, []), init=lambda **_: ended.append("begun"), shutdown=lambda: None,
        remote=lambda **_: lambda task: task,
        exceptions=SimpleNamespace(WorkerCrashedError=Died, LocalRayletDiedError=Dead, **wrongs),
    )  # fmt: skip
    made.there, made.begun_again = None, 0
    made.ledger, made.workers, made.entries, made.crashes = ledger, 1, (), {}
    made.at_work = dict.fromkeys(range(len(ended)), "a" * 64)
    return made


def test_an_error_of_a_task_of_ray_is_the_users_to_read_and_a_killed_process_is_not(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, make=True)
    with pytest.raises(ResourceError, match=r"the task of cell aaaaaaaaaaaaaaaa failed: no ledger here"):
        engine(ledger, [OfATask(ConfigError("no ledger here\nTraceback"))]).check()
    with pytest.raises(ResourceError, match=r"failed: runtime_env cannot be set up"):
        engine(ledger, [RuntimeError("\nruntime_env cannot be set up\n...")]).check()
    with pytest.raises(ResourceError, match=r"disk is full"):
        engine(ledger, [("the disk is full", [])]).check()
    assert engine(ledger, [Died("SIGKILL"), ("", ["slower"])]).check() == ["slower"]
    assert engine(ledger, [Died("SIGKILL")] * MOST_ATTEMPTS).check() == []
    with pytest.raises(ResourceError, match=r"7 processes of Ray in a row ended before .*\(Died: SIGKILL\)"):
        engine(ledger, [Died("SIGKILL")] * (MOST_ATTEMPTS + 1)).check()


class Unprepared:
    """A template whose warm-up fails, and in which each run is fine or not."""

    at_work = False

    def __init__(self, status: int) -> None:
        self.status = status

    def warm(self, *_: object) -> str:
        return "ImportError: no such type"

    def run(self, *_: object, timeout_s: object) -> Outcome:
        return Outcome(self.status, 'luthier-error "it has words of its own"')


def test_a_cluster_of_our_own_that_has_died_is_started_anew_and_not_for_ever(tmp_path: Path) -> None:
    ended: list[Any] = [Dead("heartbeats"), Dead("heartbeats"), ("", [])]
    made = engine(Ledger(tmp_path, make=True), ended)
    assert made.check() == ["Ray has died on this machine and was started anew (heartbeats)"]
    assert ended[3:] == ["begun"] and not made.at_work, "its other tasks have died with it"
    made.at_work = {0: "a" * 64}
    for _ in range(MOST_ATTEMPTS - 1):
        made.check()
        made.at_work = {0: "a" * 64}
    with pytest.raises(ResourceError, match="Ray has died 7 times in a row"):
        made.check()
    made.there = "10.0.0.1:6379"
    made.at_work = {0: "a" * 64}
    assert made.check() == [], "of another cluster the other machines go on"
    lost = engine(made.ledger, [Dead("heartbeats")] * (MOST_ATTEMPTS + 1))
    lost.there = made.there
    with pytest.raises(ResourceError, match=r"7 processes of Ray in a row ended before .*\(Dead: heartbeats\)"):
        lost.check()


def test_what_cannot_be_loaded_ahead_is_said_once(tmp_path: Path) -> None:
    lines, failed = list[str](), list[str]()
    ledger, local = Ledger(tmp_path, make=True), Local.__new__(Local)
    local.workers, local.error = [Worker(ledger, Unprepared(3)) for _ in range(2)], None  # type: ignore[arg-type]

    def begin(entries: Sequence[Entry]) -> None:
        for entry, worker in zip(entries, local.workers, strict=False):
            claim = ledger.claim(entry.id)
            assert claim is not None
            worker.one(claim, entry)

    local.begin = begin  # type: ignore[method-assign]
    sweep = Sweep(ledger, lambda n: local, say=lines.append)
    cells = cells_of(RunSpec(model="m", data=DataSpec(source="d")), [Entrant("ia3", "ia3", {})], range(2), tmp_path)
    sweep.settle(cells, lambda cell, failure, told: failed.append(failure.message if failure else ""))
    assert failed == ["it has words of its own"] * 2
    assert len(lines) == 1 and list(local.check()) == [local.workers[0].notes[0]] * 2
    assert local.workers[0].notes[0].startswith("m: ") and "(ImportError: no such type)" in local.workers[0].notes[0]


def test_a_function_that_fails_in_the_template_says_why(tmp_path: Path) -> None:
    code = tmp_path / "code.py"
    code.write_text("def warm():\n    raise KeyError('gone')\n\n\ndef fine():\n    print('x')\n")
    with Template(("json",)) as template:
        assert template.warm(code, "warm", {}) == "KeyError: 'gone'"
        assert template.warm(code, "fine", {}) == ""
        assert template.run(code, "fine").output == "x\n"


def test_an_idle_worker_looks_less_often_until_there_is_something_new(tmp_path: Path) -> None:
    worker = Worker(Ledger(tmp_path, make=True), SimpleNamespace(close=lambda: None))  # type: ignore[arg-type]
    pauses: list[float] = []

    def wait(seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 12  # somebody has set it

    worker.awake = SimpleNamespace(wait=wait, clear=lambda: None)  # type: ignore[assignment]
    worker.work(lambda: (), lambda: len(pauses) < 14)
    assert pauses[0] == POLL and pauses[:12] == sorted(pauses[:12]) and pauses[11] == MOST_POLL
    assert pauses[12] == POLL


def test_who_is_given_cells_is_awake_at_once(tmp_path: Path) -> None:
    local = Local.__new__(Local)
    local.workers = [Worker(Ledger(tmp_path, make=True), SimpleNamespace())]  # type: ignore[arg-type]
    assert not local.workers[0].awake.is_set()
    local.begin([Entry(id="a" * 64, spec={}, run="cells/a")])
    assert local.workers[0].awake.is_set()


def test_a_way_that_is_not_there_is_refused_with_the_nearest_or_its_extra() -> None:
    one_of("--search", "grid", {"grid": "", "optuna": "search"})
    with pytest.raises(ConfigError, match=r"--search gird: there are grid, optuna\. Did you mean 'grid'\?"):
        one_of("--search", "gird", {"grid": "", "optuna": "search"})
    with pytest.raises(UsageError, match=r"the package nowhere is not installed\. pip install luthier\[extra\]"):
        one_of("--search", "nowhere", {"grid": "", "nowhere": "extra"})

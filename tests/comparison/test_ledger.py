"""The ledger of a sweep: who may take a cell, whose answer counts, and what is left when processes are ended."""

import json
import os
import time
from pathlib import Path

import pytest

from luthier.core import ConfigError, IntegrityError, ResourceError
from luthier.runs import durable
from luthier.runs.fault import Fault
from luthier.runs.ledger import LEDGER_VERSION, MOST_ATTEMPTS, Claim, Entry, Ledger, cell_id
from luthier.runs.spec import DataSpec, RunSpec
from luthier.testing import count_ops, installed

SPEC = RunSpec(model="m", data=DataSpec(source="d"), steps=3)
ID = cell_id(SPEC)


def made(home: Path, lease: float = 60.0) -> Ledger:
    home.mkdir(exist_ok=True)
    ledger = Ledger(home, make=True, lease=lease)
    ledger.add([Entry(id=ID, spec={"model": "m"}, run="cells/one")])
    return ledger


def held_elsewhere(claim: Claim) -> None:
    """As if the holder were on a machine of which nothing can be proven."""
    told = json.loads(claim.path.read_bytes())
    claim.path.write_text(json.dumps({**told, "host": "elsewhere", "boot": "another"}))


def test_a_cell_is_taken_once_and_its_result_is_written_once(tmp_path: Path) -> None:
    one, two = made(tmp_path), Ledger(tmp_path)
    claim = one.claim(ID)
    assert claim is not None and two.claim(ID) is None and two.state(ID) == "running"
    assert one.commit(claim, {"scores": {"accuracy": 0.5}})
    assert two.state(ID) == "done" and two.claim(ID) is None
    assert not one.commit(claim, {"scores": {"accuracy": 0.9}}), "never a second time"
    told = two.result(ID)
    assert told is not None and told["scores"] == {"accuracy": 0.5} and two.discarded() == 1


def test_a_lease_that_runs_out_is_taken_over_and_the_late_answer_is_refused(tmp_path: Path) -> None:
    one, two = made(tmp_path), Ledger(tmp_path, lease=0.05)
    late = one.claim(ID)
    assert late is not None
    held_elsewhere(late)
    assert two.claim(ID) is None, "nobody is called dead before he was watched for the length of a lease"
    time.sleep(0.1)
    late.beat()
    assert two.claim(ID) is None, "a sign of life begins it anew"
    time.sleep(0.1)
    claim = two.claim(ID)
    assert claim is not None and claim.n == 2
    assert not one.commit(late, {"scores": {}}) and one.discarded() == 1 and one.result(ID) is None
    assert two.commit(claim, {"scores": {"accuracy": 1.0}})


def test_a_damaged_result_is_named_and_the_run_is_not_computed_again_and_again(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    claim = ledger.claim(ID)
    assert claim is not None
    damaged = ledger.path / "results" / f"{ID}.json"
    damaged.write_text('{"id": "')
    with pytest.raises(IntegrityError, match=f"{ID}.json: is damaged"):
        ledger.commit(claim, {"scores": {}})
    damaged.unlink()  # as the message says
    again = ledger.claim(ID)
    assert again is not None and ledger.commit(again, {"scores": {}}) and ledger.discarded() == 0


def test_a_clock_that_jumps_takes_no_lease(tmp_path: Path) -> None:
    one, two = made(tmp_path), Ledger(tmp_path, lease=30)
    claim = one.claim(ID)
    assert claim is not None
    held_elsewhere(claim)
    for when in (0, 4e9, 1e9):
        os.utime(claim.path, (when, when))
        assert two.claim(ID) is None


def test_a_holder_that_is_proven_dead_is_not_waited_for(tmp_path: Path) -> None:
    one = made(tmp_path)
    claim = one.claim(ID)
    assert claim is not None
    told = json.loads(claim.path.read_bytes())
    claim.path.write_text(json.dumps({**told, "ticks": told["ticks"] - 1}))  # its number now has another process
    assert one.state(ID) == "stopped" and Ledger(tmp_path).claim(ID) is not None


def test_attempts_count_while_they_get_no_further(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    for n in range(1, MOST_ATTEMPTS + 1):
        claim = ledger.claim(ID, behind=4)
        assert claim is not None and ledger.attempts(ID) == n
        ledger.ended(claim)
    claim = ledger.claim(ID, behind=5)
    assert claim is not None and ledger.attempts(ID) == 1, "it has got further"
    ledger.release(claim)
    assert ledger.claim(ID, behind=5) is not None and ledger.attempts(ID) == 1, "what was let go of does not count"


def test_a_failure_stands_until_the_cell_is_reopened(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    claim = ledger.claim(ID)
    assert claim is not None
    ledger.fail(claim, "no such file", 3)
    assert ledger.state(ID) == "failed" and ledger.claim(ID) is None
    ledger.reopen(ID)
    assert ledger.claim(ID) is not None


@pytest.mark.parametrize("kind", ["kill", "enospc"])
def test_a_commit_that_is_disturbed_anywhere_is_whole_or_is_not_there(kind: str, tmp_path: Path) -> None:
    def work(ledger: Ledger) -> None:
        claim = ledger.claim(ID)
        assert claim is not None and ledger.commit(claim, {"scores": {"accuracy": 0.25}})

    places = len(count_ops(lambda: work(made(tmp_path / "whole"))))
    for k in range(1, places + 1):
        home = tmp_path / f"{kind}{k}"
        fault = Fault("*", k, "die" if kind == "kill" else kind)
        with installed(fault):
            try:
                work(made(home))
            except BaseException as error:
                assert type(error).__name__ in ("SimulatedDeath", "ResourceError", "DiskFull"), error
        again = made(home, lease=0.0)
        told = again.result(ID)
        if told is None:  # nobody lives who works at it: the next one does
            again.reopen(ID)
            for path in (home / "ledger" / "claims").glob(f"{ID}.*"):
                held_elsewhere(Claim(ID, 1, path))
            again.claim(ID)
            time.sleep(0.001)
            claim = again.claim(ID) or Claim(ID, again._last(ID)[0], again._file(ID, again._last(ID)[0]))
            assert again.commit(claim, {"scores": {"accuracy": 0.25}})
        assert again.result(ID)["scores"] == {"accuracy": 0.25}  # type: ignore[index]


def test_a_ledger_of_another_version_or_of_nobody_is_refused_with_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no ledger"):
        Ledger(tmp_path)
    made(tmp_path)
    where = tmp_path / "ledger" / "ledger.json"
    for content, said in (
        ({"format": "luthier-ledger", "version": LEDGER_VERSION + 1}, "Update luthier"),
        ({"format": "other"}, "is not luthier's"),
    ):
        where.write_text(json.dumps(content))
        with pytest.raises(IntegrityError, match=said):
            Ledger(tmp_path, make=True)
    where.write_text('{"format": "lut')
    with pytest.raises(IntegrityError, match="Remove this one file"):
        Ledger(tmp_path)
    where.unlink()
    assert [e.id for e in Ledger(tmp_path, make=True).entries()] == [ID]


def test_a_cell_that_would_write_elsewhere_is_not_read(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    path = tmp_path / "ledger" / "specs" / f"{ID}.json"
    told = json.loads(path.read_bytes())
    for run in ("/etc/cron.d", "../outside", "cells/../../outside"):
        path.write_text(json.dumps({**told, "run": run}))
        assert ledger.entries() == []
    path.write_text(path.read_text()[:40])
    assert ledger.entries() == [], "half-written: whoever wants the cell writes it again"
    ledger.add([Entry(id=ID, spec={"model": "m"}, run="cells/one")])
    assert [e.run for e in ledger.entries()] == ["cells/one"]


def test_a_full_disk_is_said_and_leaves_nothing_half(tmp_path: Path) -> None:
    ledger = made(tmp_path)
    with installed(Fault("*", 2, "enospc")), pytest.raises(ResourceError, match="claims"):
        ledger.claim(ID)
    assert ledger.claim(ID) is not None and durable.sweep(tmp_path / "ledger" / "claims") == []

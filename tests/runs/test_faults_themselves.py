"""The fault layer must itself do what it says, or the tests that use it prove nothing."""

import os
from pathlib import Path

import pytest

from luthier.core import ConfigError, DiskFull
from luthier.runs import durable
from luthier.runs.fault import Fault, PowerLoss, SimulatedDeath, _Undo, parse_fault
from luthier.testing import count_ops, installed


def test_a_fault_is_read_from_its_text() -> None:
    fault = parse_fault("save:7:kill")
    assert (fault.scope, fault.k, fault.kind) == ("save", 7, "kill")


@pytest.mark.parametrize("text", ["save", "save:7", "save:0:kill", "save:-1:kill", "save:7:explode", "save:x:kill", ""])
def test_a_text_that_is_no_fault_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"for example save:7:kill"):
        parse_fault(text)


def test_operations_are_numbered_in_order_and_carry_their_scopes(tmp_path: Path) -> None:
    def work() -> None:
        with durable.scope("outer"):
            durable.make_folder(tmp_path / "new")
            with durable.scope("inner"):
                durable.write_bytes(tmp_path / "new" / "file", b"content")

    operations = count_ops(work)
    assert [o.kind for o in operations] == ["mkdir", "fsync_dir", "open", "write", "fsync", "rename", "fsync_dir"]
    assert [o.scopes for o in operations] == [("outer",)] * 2 + [("outer", "inner")] * 5
    (tmp_path / "new" / "file").unlink()
    (tmp_path / "new").rmdir()
    assert len(count_ops(work, within="inner")) == 5


def test_nothing_is_announced_twice_or_left_out(tmp_path: Path) -> None:
    """Every system call that changes the disk during a save has an announced operation of its own."""

    def work() -> None:
        with durable.folder(tmp_path / f"made-{len(list(tmp_path.iterdir()))}", {}) as draft:
            draft.write_bytes("a", b"1")
            draft.write_json("b", [1])

    calls: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "writev", "mkdir", "rename")}
    try:
        for name, function in real.items():
            setattr(os, name, lambda *a, _n=name, _f=function, **k: (calls.append(_n), _f(*a, **k))[1])
        announced = [o.kind.removesuffix("_dir") for o in count_ops(work)]
    finally:
        for name, function in real.items():
            setattr(os, name, function)
    assert [kind for kind in announced if kind != "open"] == [call.replace("writev", "write") for call in calls]


def test_after_a_simulated_death_nothing_can_change_the_disk(tmp_path: Path) -> None:
    with installed(Fault("*", 3, "die")), pytest.raises(SimulatedDeath):
        durable.write_bytes(tmp_path / "file", b"content")
    left = list(tmp_path.iterdir())
    assert [p.name[:5] for p in left] == [".tmp-"], "the clean-up after an error did not run"
    assert durable.sweep(tmp_path) == [left[0].name]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_half_a_write_for_the_clean_up(tmp_path: Path) -> None:
    with installed("*:2:enospc") as fault, pytest.raises(DiskFull, match="Free some space"):
        durable.write_bytes(tmp_path / "file", b"content")
    assert fault.fired
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "data", "expected"),
    [(True, True, None), (True, False, None), (False, True, b""), (False, False, b"content")],
)
def test_a_power_loss_takes_bytes_and_names_that_were_not_fsynced(
    tmp_path: Path, names: bool, data: bool, expected: bytes | None
) -> None:
    power = PowerLoss(names=names, data=data)
    durable.install(power)
    try:
        durable._op("open", tmp_path / "file")
        (tmp_path / "file").write_bytes(b"")
        durable._op("write", tmp_path / "file")
        (tmp_path / "file").write_bytes(b"content")
        durable._op("unlink", tmp_path / "next")  # announced, not done
    finally:
        durable.uninstall(power)
    power.strike()
    path = tmp_path / "file"
    assert (path.read_bytes() if path.exists() else None) == expected


def test_a_power_loss_brings_back_what_was_replaced_and_removed(tmp_path: Path) -> None:
    for name in ("replaced", "removed"):
        (tmp_path / name).write_bytes(b"old " + name.encode())
    power = PowerLoss()
    durable.install(power)
    try:
        durable.remove(tmp_path / "removed")
        durable._op("open", tmp_path / ".tmp-x")
        (tmp_path / ".tmp-x").write_bytes(b"new")
        durable._op("rename", tmp_path / ".tmp-x", tmp_path / "replaced")
        (tmp_path / ".tmp-x").replace(tmp_path / "replaced")
        durable._op("fsync_dir", tmp_path)  # announced, not done
    finally:
        durable.uninstall(power)
    power.strike()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {
        "replaced": b"old replaced",
        "removed": b"old removed",
    }


def test_a_power_loss_spares_what_was_fsynced(tmp_path: Path) -> None:
    power = PowerLoss()
    durable.install(power)
    try:
        durable.write_bytes(tmp_path / "file", b"content")
        with durable.folder(tmp_path / "folder", {}) as draft:
            draft.write_bytes("inside", b"1")
    finally:
        durable.uninstall(power)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    power._settle()
    power.strike()
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_folder_whose_making_did_not_last_is_gone_with_all_that_is_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    (folder / "file").write_text("x")
    _Undo("mkdir", folder, {tmp_path}).do()
    assert list(tmp_path.iterdir()) == []

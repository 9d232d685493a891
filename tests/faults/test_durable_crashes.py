"""Kills, power losses and full disks at every single operation of a save, a prune and a create.

Every killed run is a real process killed by SIGKILL; `run` functions below are what it does.
"""

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from luthier.core import DiskFull, LuthierError, ResourceError
from luthier.runs import RunFolder, checkpoints, durable, load_newest, prune, save_checkpoint
from luthier.runs.checkpoint import _verify
from luthier.runs.fault import Operation
from luthier.testing import Template, count_ops, every_operation

torch.set_num_threads(1)

Tensors = dict[str, dict[str, torch.Tensor]]
Note = Callable[[str, object], None]

NAMES = {
    "kill": "SIGKILL",
    "drop": "power loss",
    "drop-names": "power loss (names lost, bytes kept)",
    "drop-bytes": "power loss (bytes lost, names kept)",
    "enospc": "disk full",
    "edquot": "quota used up",
    "eio": "input/output error",
    "erofs": "disk read-only",
}


def tensors_of(step: int) -> Tensors:
    made = torch.Generator().manual_seed(step)
    return {
        "adapter": {"attn.q@0.a": torch.randn(3, 5, generator=made), "attn.q@0.b": torch.randn(7, 3, generator=made)},
        "optimizer": {"attn.q@0.a.m": torch.randn(3, 5, generator=made), "steps": torch.tensor(step)},
        "method": {"importance": torch.randn(2, generator=made)},
    }


def save(run: RunFolder, step: int) -> None:
    run.event("step", lasting=False, step=step, loss=1 / step)
    save_checkpoint(run, step, tensors_of(step), {"step": step, "cursor": 3 * step})


def is_whole(run: RunFolder) -> int:
    """Load as a resume would; return the step, having compared every number with what was saved."""
    found, skipped = load_newest(run)
    assert found is not None
    assert skipped == []
    expected = tensors_of(found.step)
    assert set(found.tensors) == set(expected)
    for stem, group in expected.items():
        assert set(found.tensors[stem]) == set(group)
        assert all(torch.equal(found.tensors[stem][name], group[name]) for name in group)
    assert found.state == {"step": found.step, "cursor": 3 * found.step}
    rows = [row["step"] for row in run.journal.rows()]
    assert rows[: found.event_rows] == list(range(1, found.step + 1))
    left = [p.name for p in [*run.path.iterdir(), *run.ckpt.iterdir()] if p.name.startswith((".tmp-", ".del-"))]
    assert left == []
    return found.step


def step_of(run: RunFolder) -> int:
    return int(checkpoints(run)[0].name[5:13])


def save_third(folder: str) -> None:
    with RunFolder.open(folder) as run:
        save(run, 3)


def large_tensors() -> Tensors:
    """Large enough for digests in threads, writes in several chunks, and fsyncs before the digests are known."""
    made = torch.Generator().manual_seed(3)
    many = {f"bias.{i}": torch.randn(7, generator=made) for i in range(2 * durable.BUFFERS)}
    return {
        "adapter": {"a": torch.randn(durable.THREADED_FROM // 4 + 5, generator=made), **many},
        "optimizer": {"a.m": torch.randn(durable.CHUNK // 4 + 3, generator=made), "a.v": torch.ones(700, 501)},
    }


def save_large(folder: str) -> None:
    with RunFolder.open(folder) as run:
        run.event("step", lasting=False, step=3, loss=0.5)
        save_checkpoint(run, 3, large_tensors(), {})


def save_third_then_tell(folder: str) -> None:
    run = RunFolder.open(folder)
    save(run, 3)
    run.event("after_the_save")


def prune_all(folder: str) -> None:
    with RunFolder.open(folder) as run:
        prune(run, keep_last=2, keep_best=2, powers_of_two=False)


def create_run(folder: str) -> None:
    RunFolder.create(folder, {"seed": 7}).close()


def careless_save(folder: str) -> None:
    """A save that forgets to fsync its files: the mistake that F03 is there to find."""
    run = RunFolder.open(folder)
    temporary = run.ckpt / ".tmp-careless"
    with durable.scope("save"):
        durable._op("mkdir", temporary)
        temporary.mkdir()
        for item in sorted((run.ckpt / "step-00000002").iterdir()):
            durable._op("open", temporary / item.name)
            (temporary / item.name).write_bytes(b"")
            durable._op("write", temporary / item.name)
            (temporary / item.name).write_bytes(item.read_bytes())
        durable._sync_folder(temporary)
        durable.rename(temporary, run.ckpt / "step-00000003")
    run.event("after_the_save")


@pytest.fixture(scope="module")
def template() -> Iterator[Template]:
    with Template() as made:
        yield made


@pytest.fixture(scope="module")
def two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "run"
    with RunFolder.create(folder, {"seed": 7}) as run:
        save(run, 1)
        save(run, 2)
    return folder


@pytest.fixture(scope="module")
def six_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six") / "run"
    with RunFolder.create(folder, {"seed": 7}) as run:
        for step in range(1, 7):
            save(run, step)
    return folder


def crash_everywhere(
    template: Template,
    function: str,
    scope: str,
    kind: str,
    start: Path,
    tmp_path: Path,
    check: Callable[[Path], None],
) -> int:
    """Kill `function` at each operation of `scope` in turn, calling `check` on each wreck; returns how many."""
    for k in range(1, 1000):
        folder = tmp_path / f"{kind}-{k}" / "run"
        if start.exists():
            shutil.copytree(start, folder)
        else:
            folder.parent.mkdir()
        outcome = template.run(__file__, function, {"folder": str(folder)}, fault=f"{scope}:{k}:{kind}")
        if outcome.status == 0:
            return k - 1
        assert outcome.status == -signal.SIGKILL, outcome.output
        check(folder)
        shutil.rmtree(folder.parent)
    raise AssertionError("the fault never stopped firing")


@pytest.mark.fault("F01", "every operation of a save")
def test_f01_a_kill_at_every_operation_of_a_save_is_recovered(
    template: Template, two_saved: Path, tmp_path: Path, record_property: Note
) -> None:
    recovered = []

    def check(folder: Path) -> None:
        with RunFolder.open(folder) as run:
            recovered.append(is_whole(run))
            assert any(line["event"] == "took_over_lock" for line in run.events())
            if recovered[-1] == 2:
                run.truncate_events(after=2)
                save(run, 3)
        with RunFolder.open(folder) as run:
            assert is_whole(run) == 3

    n = crash_everywhere(template, "save_third", "save", "kill", two_saved, tmp_path, check)
    assert n == len(recovered) >= 20
    assert recovered == sorted(recovered), "the checkpoint appears at one operation and stays"
    assert set(recovered) == {2, 3}, "some kills come before the rename and some after"
    record_property("counted: a save, SIGKILL", n)


@pytest.mark.fault("F03", "every operation of a save")
@pytest.mark.parametrize("kind", ["drop", "drop-names", "drop-bytes"])
def test_f03_a_power_loss_at_every_operation_of_a_save_is_recovered(
    template: Template, two_saved: Path, tmp_path: Path, kind: str, record_property: Note
) -> None:
    recovered = []

    def check(folder: Path) -> None:
        with RunFolder.open(folder) as run:
            recovered.append(is_whole(run))

    n = crash_everywhere(template, "save_third", "save", kind, two_saved, tmp_path, check)
    assert n == len(recovered) >= 20
    record_property(f"counted: a save, {NAMES[kind]}", n)


@pytest.mark.fault("F01", "every operation of a save")
@pytest.mark.fault("F03", "every operation of a save")
@pytest.mark.parametrize("kind", ["kill", "drop", "drop-names", "drop-bytes"])
def test_f01_f03_a_save_with_digests_in_threads_is_recovered_from_every_operation(
    template: Template, two_saved: Path, tmp_path: Path, kind: str, record_property: Note
) -> None:
    expected = large_tensors()
    steps = []

    def check(folder: Path) -> None:
        with RunFolder.open(folder) as run:
            found, skipped = load_newest(run)
            assert found is not None
            assert skipped == []
            steps.append(found.step)
            if found.step == 3:
                assert all(torch.equal(found.tensors[s][n], t) for s, g in expected.items() for n, t in g.items())

    n = crash_everywhere(template, "save_large", "save", kind, two_saved, tmp_path, check)
    assert n == len(steps) >= 21
    assert steps == sorted(steps)
    assert steps[0] == 2, "some come before the rename"
    record_property(f"counted: a save with digests in threads, {NAMES[kind]}", n)


def test_a_save_with_digests_in_threads_always_does_the_same_operations(two_saved: Path, tmp_path: Path) -> None:
    seen = []
    for name in ("one", "two", "three"):
        shutil.copytree(two_saved, tmp_path / name)
        operations = count_ops(lambda name=name: save_large(str(tmp_path / name)), within="save")  # type: ignore[misc]
        seen.append([(o.kind, o.path.name if o.path.suffix else "") for o in operations])
    assert seen[0] == seen[1] == seen[2]
    assert [kind for kind, name in seen[0] if name == "optimizer.safetensors"] == ["open", *["write"] * 3, "fsync"]


@pytest.mark.fault("F03", "right after a save")
@pytest.mark.parametrize("kind", ["drop", "drop-names", "drop-bytes"])
def test_f03_what_was_saved_survives_a_power_loss_right_after(
    template: Template, two_saved: Path, tmp_path: Path, kind: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    # Of the events, the first is the row, the second the fact (append and fsync), written after the save has returned.
    operations = count_events(two_saved, tmp_path)
    outcome = template.run(
        __file__, "save_third_then_tell", {"folder": str(folder)}, fault=f"event:{operations}:{kind}"
    )
    assert outcome.status == -signal.SIGKILL, outcome.output
    with RunFolder.open(folder) as run:
        assert is_whole(run) == 3


def count_events(start: Path, tmp_path: Path) -> int:
    """The number of the append of the fact that `save_third_then_tell` ends with."""
    shutil.copytree(start, tmp_path / "counted")
    operations = count_ops(lambda: save_third_then_tell(str(tmp_path / "counted")), within="event")
    return max(number for number, operation in enumerate(operations, start=1) if operation.kind == "append")


@pytest.mark.fault("F03", "the harness finds a missing fsync")
def test_f03_the_harness_finds_a_save_that_forgets_to_fsync(
    template: Template, two_saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_saved, folder)
    outcome = template.run(__file__, "careless_save", {"folder": str(folder)}, fault="event:1:drop-bytes")
    assert outcome.status == -signal.SIGKILL, outcome.output
    with RunFolder.open(folder) as run:
        found, skipped = load_newest(run)
    assert found is not None
    assert found.step == 2
    assert [path.name for path, _ in skipped] == ["step-00000003"]


@pytest.mark.fault("F02", "every operation of pruning", "the best one stays")
@pytest.mark.parametrize("kind", ["kill", "drop"])
def test_f02_a_kill_at_every_operation_of_pruning_never_leaves_too_few(
    template: Template, six_saved: Path, tmp_path: Path, kind: str, record_property: Note
) -> None:
    def check(folder: Path) -> None:
        with RunFolder.open(folder) as run:
            kept = {int(path.name[5:13]) for path in checkpoints(run) if _verify(path)}
            assert {2, 5, 6} <= kept, "the last two and the best"
            assert is_whole(run) == 6
            prune(run, keep_last=2, keep_best=2, powers_of_two=False)
            assert sorted(p.name for p in run.ckpt.iterdir()) == ["step-00000002", "step-00000005", "step-00000006"]

    n = crash_everywhere(template, "prune_all", "prune", kind, six_saved, tmp_path, check)
    assert n >= 20
    record_property(f"counted: pruning, {NAMES[kind]}", n)


@pytest.mark.parametrize("kind", ["kill", "drop", "drop-names", "drop-bytes"])
def test_a_kill_at_every_operation_of_creating_a_run_leaves_a_whole_run_or_none(
    template: Template, tmp_path: Path, kind: str, record_property: Note
) -> None:
    def check(folder: Path) -> None:
        if folder.exists():
            with RunFolder.open(folder) as run:
                assert run.spec == {"seed": 7}
                assert load_newest(run) == (None, [])
        else:
            create_run(str(folder))
        assert [p.name for p in folder.parent.iterdir()] == ["run"]

    n = crash_everywhere(template, "create_run", "create", kind, tmp_path / "nothing", tmp_path, check)
    assert n >= 20
    record_property(f"counted: making a run folder, {NAMES[kind]}", n)


@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_an_error_at_every_operation_of_creating_a_run_is_told_as_what_it_is(
    tmp_path: Path, kind: str, record_property: Note
) -> None:
    numbers = iter(range(10_000))
    n = 0
    for _, folder, error in every_operation(
        "create", kind, lambda: tmp_path / f"run-{next(numbers)}", lambda folder: create_run(str(folder))
    ):
        n += 1
        assert isinstance(error, ResourceError), "even where the folder is there already: the fault is the disk's"
        assert isinstance(error, DiskFull) == (kind == "enospc")
        if folder.exists():
            with RunFolder.open(folder) as run:
                assert run.spec == {"seed": 7}
    assert n >= 20
    record_property(f"counted: making a run folder, {NAMES[kind]}", n)


def reopened(start: Path, tmp_path: Path) -> Callable[[], RunFolder]:
    numbers = iter(range(10_000))

    def prepare() -> RunFolder:
        folder = tmp_path / f"copy-{next(numbers)}" / "run"
        shutil.copytree(start, folder)
        return RunFolder.open(folder)

    return prepare


@pytest.mark.fault("F08", "every operation of a save")
@pytest.mark.parametrize("kind", ["enospc", "edquot"])
def test_f08_a_full_disk_at_every_operation_of_a_save_leaves_the_last_good_one(
    two_saved: Path, tmp_path: Path, kind: str, record_property: Note
) -> None:
    n = 0
    for _, run, error in every_operation("save", kind, reopened(two_saved, tmp_path), lambda run: save(run, 3)):
        n += 1
        with run:
            # Two checkpoints leave nothing to prune, so there is no second try; but after the rename there are three.
            assert isinstance(error, DiskFull) if step_of(run) == 2 else error is None
            assert not list(run.ckpt.glob(".tmp-*")), "nothing half-written stays"
            assert is_whole(run) in (2, 3)
    assert n >= 20
    record_property(f"counted: a save, {NAMES[kind]}", n)


@pytest.mark.fault("F08", "pruned and tried again")
def test_f08_a_full_disk_is_answered_by_pruning_and_one_more_try(six_saved: Path, tmp_path: Path) -> None:
    outcomes = []
    for _, run, error in every_operation("save", "enospc", reopened(six_saved, tmp_path), lambda run: save(run, 7)):
        with run:
            outcomes.append(error is None)
            assert is_whole(run) == 7 or error is not None
            assert len([p for p in checkpoints(run) if _verify(p)]) >= 2
    # The only operation that is not repeated is making the event log's rows last, before the save proper.
    assert outcomes.count(False) == 1


class FullDisk:
    """No write succeeds any more."""

    def before(self, operation: Operation) -> None:
        if operation.kind in ("write", "open", "mkdir", "append"):
            raise OSError(28, "No space left on device", str(operation.path))


def test_f08_a_disk_that_stays_full_ends_the_run_with_what_it_had(six_saved: Path, tmp_path: Path) -> None:
    run = reopened(six_saved, tmp_path)()
    full = FullDisk()
    durable.install(full)
    try:
        with pytest.raises(DiskFull, match="Free some space"):
            save_checkpoint(run, 7, tensors_of(7), {})
    finally:
        durable.uninstall(full)
    with run:
        assert is_whole(run) == 6


@pytest.mark.fault("F10", "every operation of a save")
@pytest.mark.parametrize("kind", ["eio", "erofs"])
def test_f10_an_error_at_every_operation_of_a_save_is_never_a_success(
    two_saved: Path, tmp_path: Path, kind: str, record_property: Note
) -> None:
    n = 0
    for k, run, error in every_operation("save", kind, reopened(two_saved, tmp_path), lambda run: save(run, 3)):
        n += 1
        with run:
            assert isinstance(error, ResourceError), f"operation {k}"
            assert not isinstance(error, DiskFull)
            assert str(run.path) in str(error)
            assert is_whole(run) in (2, 3)
    assert n >= 20
    record_property(f"counted: a save, {NAMES[kind]}", n)


@pytest.mark.fault("F10", "every operation of a save")
def test_f10_an_error_at_every_operation_of_a_save_with_digests_in_threads_is_never_a_success(
    two_saved: Path, tmp_path: Path, record_property: Note
) -> None:
    tensors, n, threads = large_tensors(), 0, threading.active_count()
    for _, run, error in every_operation(
        "save", "eio", reopened(two_saved, tmp_path), lambda run: save_checkpoint(run, 3, tensors, {})
    ):
        n += 1
        with run:
            assert isinstance(error, ResourceError)
            assert not list(run.ckpt.glob(".tmp-*"))
            assert threading.active_count() == threads, "no digest goes on"
            assert step_of(run) in (2, 3)
    assert n >= 20
    record_property(f"counted: a save with digests in threads, {NAMES['eio']}", n)


@pytest.mark.fault("F11", "saves never overlap")
def test_f11_saves_on_a_slow_disk_never_overlap(
    two_saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.runs.fault.SLEEP_SECONDS", 0.02)
    order: list[str] = []

    class Order:
        def before(self, operation: Operation) -> None:
            if operation.kind == "mkdir":
                order.append(f"begins {operation.path.name.split('-')[2]}")
            if operation.kind == "rename" and operation.target is not None:
                order.append(f"ends {operation.target.name.split('-')[1]}")

    def two_saves(run: RunFolder) -> None:
        save(run, 3)
        save(run, 4)

    listener = Order()
    durable.install(listener)
    try:
        slow = 0
        for _, run, error in every_operation("save", "sleep", reopened(two_saved, tmp_path), two_saves):
            run.close()
            slow += 1
            assert error is None
            assert order == ["begins 00000003", "ends 00000003", "begins 00000004", "ends 00000004"]
            order.clear()
    finally:
        durable.uninstall(listener)
    assert slow >= 40


def test_a_failed_write_of_a_single_file_keeps_the_old_one(tmp_path: Path) -> None:
    def prepare() -> Path:
        durable.write_bytes(tmp_path / "scores.json", b"old")
        return tmp_path / "scores.json"

    def work(path: Path) -> None:
        with durable.scope("file"):
            durable.write_bytes(path, b"new")

    seen: list[tuple[bytes, LuthierError | None]] = []
    for _, path, error in every_operation("file", "eio", prepare, work):
        seen.append((path.read_bytes(), error))
        assert [p.name for p in tmp_path.iterdir()] == ["scores.json"]
    assert all(isinstance(error, ResourceError) for _, error in seen)
    assert [content for content, _ in seen] == [b"old"] * 4 + [b"new"], "open, write, fsync, rename; then the folder"

"""F08 to F11: disks that are full, fail or are slow in the middle of training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from little import little_spec

from luthier.core import DiskFull, ResourceError
from luthier.runs import RunFolder, checkpoint, load_newest
from luthier.runs.spec import CheckpointSpec, RunSpec
from luthier.testing import count_ops, installed
from luthier.testing.faults import every_operation
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("little")


def spec_of(home: Path, out: Path) -> RunSpec:
    return little_spec(home, steps=6, out=str(out), checkpoint=CheckpointSpec(every_steps=2))


@pytest.fixture(scope="session")
def whole(home: Path) -> dict[str, str]:
    train(spec_of(home, home / "whole"))
    return run_digests(home / "whole")


@pytest.mark.fault("F10", "in a run")
@pytest.mark.fault("F08", "in a run")
@pytest.mark.parametrize("kind", ["enospc", "eio", "erofs"])
def test_a_disk_that_fails_in_a_later_save_leaves_the_last_checkpoint_and_the_run_resumes(
    kind: str, home: Path, tmp_path: Path, whole: dict[str, str]
) -> None:
    out = tmp_path / "run"
    saves = len(count_ops(lambda: train(spec_of(home, tmp_path / "counted")), "save"))
    ended: Exception | None = None
    with installed(f"save:{saves // 2}:{kind}") as fault:
        try:
            train(spec_of(home, out))
        except ResourceError as error:
            ended = error
    assert fault.fired
    if ended is None:
        assert kind == "enospc"  # old checkpoints were pruned and the save was made again
    else:
        assert isinstance(ended, DiskFull) == (kind == "enospc")
        found, skipped = load_newest(RunFolder.open(out, write=False))
        assert found is not None and skipped == []
        assert not (out / "tuning").exists()
        resume(out)
    assert run_digests(out) == whole


@pytest.mark.fault("F11", "in a run")
def test_a_slow_disk_changes_nothing(home: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    with installed("save:30:sleep"):
        train(spec_of(home, tmp_path / "run"))
    assert run_digests(tmp_path / "run") == whole


@pytest.mark.fault("F09", "refused before step 1")
def test_too_little_disk_is_refused_before_step_1_with_what_is_needed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, str]
) -> None:
    """F09."""
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
        with pytest.raises(DiskFull, match=r"need .* and the disk has .* free") as caught:
            train(spec_of(home, out))
    assert caught.value.exit_code == 5
    assert not [e for e in RunFolder.open(out, write=False).events() if e["event"] == "step"]
    resume(out)  # with space again
    assert run_digests(out) == whole


@pytest.mark.fault("F10", "in a run")
@pytest.mark.fault("F08", "in a run")
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["enospc", "eio"])
def test_a_disk_that_fails_at_any_operation_of_a_run_loses_nothing(
    kind: str, home: Path, tmp_path: Path, whole: dict[str, str], record_property: Any
) -> None:
    n_failed = n = 0
    numbers = iter(range(10_000))

    def work(out: Path) -> None:
        train(spec_of(home, out))

    for _, out, ended in every_operation("save", kind, lambda: tmp_path / f"run-{next(numbers)}", work):
        n += 1
        n_failed += ended is not None
        if ended is not None:
            assert isinstance(ended, ResourceError)
            resume(out)
        assert run_digests(out) == whole
    record_property(f"counted: saves of a whole run, {'disk full' if kind == 'enospc' else 'input/output error'}", n)
    assert n > 60
    assert n_failed > 0

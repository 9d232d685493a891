"""F35: a field that may change on resume is not only recorded: what the resumed run does is seen to follow it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.test_drift import OTHER
from little import little_spec

from luthier import kernels
from luthier.core import ConfigError
from luthier.runs import RunFolder, checkpoints
from luthier.runs.spec import CheckpointSpec
from luthier.runs.spec_changes import RESUME, SAME_BITS
from luthier.training.loop import Loop
from luthier.workflow import preparation as prepared
from luthier.workflow import resume, train
from luthier.workflow.resume_proof import run_digests

torch.set_num_threads(1)

Patch = pytest.MonkeyPatch


@dataclass
class Seen:
    """What was to be seen of one resumed run."""

    digests: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # what parts below the loop were asked for
    fast: bool | None = None
    threads: int = 0
    recomputes: bool = False
    workers: int = 0
    saves: list[int] = field(default_factory=list)
    passes: int = 0
    kept: int = 0
    evaluated: list[int] = field(default_factory=list)


def watch(patch: Patch) -> Seen:
    """Listen to the next run."""
    seen = Seen()
    run_to, save, gradients = Loop.run_to, Loop.save, Loop._gradients

    def running(self: Loop, until: int | None = None) -> None:
        seen.fast, seen.threads, seen.workers = kernels.fast(), torch.get_num_threads(), self.feed.batches.workers
        seen.recomputes = any(getattr(m, "gradient_checkpointing", False) for m in self.tuned.model.modules())
        run_to(self, until)

    def saving(self: Loop) -> None:
        seen.saves.append(self.step)
        save(self)

    def passing(self: Loop, *given: Any) -> Any:
        seen.passes += 1
        return gradients(self, *given)

    for name, inner in (("choose_device", prepared.choose_device), ("load_data", prepared.load_data)):
        patch.setattr(prepared, name, _asking(seen, name, inner))
    patch.setattr(prepared, "encode", _asking(seen, "encode", prepared.encode))
    patch.setattr(Loop, "run_to", running)
    patch.setattr(Loop, "save", saving)
    patch.setattr(Loop, "_gradients", passing)
    return seen


def _asking(seen: Seen, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
    def asked(*given: Any, **named: Any) -> Any:
        seen.asked[name] = (given, named)
        return inner(*given, **named)

    return asked


# field -> (another value, what must then be different). Without an entry: OTHER's value, and other bits.
PROBES: dict[str, tuple[Any, Callable[[Seen], Any]]] = {
    "data.strict": (True, lambda s: s.asked["load_data"][0][0].strict),
    "data.accept_refused": (0.5, lambda s: s.asked["encode"][1]["accept_refused"]),
    "epochs": (3.0, lambda s: s.digests["adapter"]),
    "batch.workers": (2, lambda s: s.workers),
    "eval.every": (3, lambda s: s.evaluated),
    "checkpoint.every_steps": (1, lambda s: s.saves),
    "checkpoint.every_seconds": (1e-9, lambda s: s.saves),
    "checkpoint.keep": (4, lambda s: s.kept),
    "threads": (2, lambda s: s.threads),
    "device": ("cpu", lambda s: s.asked["choose_device"][0][0]),
    "gradient_checkpointing": (True, lambda s: s.recomputes),
    "fast": (False, lambda s: s.fast),
    "recheck": (1, lambda s: s.passes),
}
MAY_CHANGE = [name for name, rule in RESUME.items() if rule != "exact"]


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stands where its second epoch begins."""
    home = tmp_path_factory.mktemp("little")
    train(
        little_spec(home, out=str(home / "run"), steps=None, epochs=2.0, checkpoint=CheckpointSpec(every_steps=2)),
        stop_at=5,
    )
    return home / "run"


def resumed(stopped: Path, out: Path, patch: Patch, changed: dict[str, Any]) -> Seen:
    shutil.copytree(stopped, out)
    threads = torch.get_num_threads()
    try:
        with patch.context() as patched:
            seen = watch(patched)
            resume(out, changed=changed)
    finally:
        torch.set_num_threads(threads)
    found = RunFolder.open(out, write=False)
    seen.digests, seen.kept = run_digests(out), len(checkpoints(found))
    seen.evaluated = [e["step"] for e in found.events() if e["event"] == "scores"]
    return seen


def test_every_probe_is_of_a_field_that_may_change() -> None:
    assert set(PROBES) <= set(MAY_CHANGE)
    assert set(MAY_CHANGE) == {n for n in RESUME if RESUME[n] in ("apply", "boundary")}


@pytest.mark.fault("F35", "every field")
@pytest.mark.parametrize("name", MAY_CHANGE)
def test_what_a_field_may_change_is_seen_to_change(
    name: str, stopped: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    value, probe = PROBES.get(name, (OTHER[name], lambda seen: seen.digests["adapter"]))
    plain = resumed(stopped, tmp_path / "plain", monkeypatch, {})
    other = resumed(stopped, tmp_path / "other", monkeypatch, {name: value})
    assert probe(other) != probe(plain), f"{name} = {value!r} was said to be applied, and nothing came of it"
    if name in SAME_BITS:
        assert other.digests == plain.digests


def test_the_folder_of_a_run_cannot_be_changed_by_resuming_it(stopped: Path, tmp_path: Path) -> None:
    shutil.copytree(stopped, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"out.*Move the folder"):
        resume(tmp_path / "run", changed={"out": str(tmp_path / "elsewhere")})
    assert not (tmp_path / "elsewhere").exists()
    (tmp_path / "run").rename(tmp_path / "moved")
    assert resume(tmp_path / "moved").path == tmp_path / "moved"

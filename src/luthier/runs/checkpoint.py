"""Checkpoints: written whole, verified before a byte of them is used, kept by rule.

    ckpt/step-00000120/{adapter,optimizer,method}.safetensors, state.json, MANIFEST.json

A second checkpoint of the same step (after a roll-back) is `step-00000120-r2`: nothing is ever replaced, so there is no
moment without it. There is no pointer to the latest one: the newest that verifies is the latest.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core import DiskFull, Diverged, IntegrityError, LuthierError, human_bytes
from luthier.runs import durable
from luthier.runs.manifest import Damaged, Verified, read_verified
from luthier.runs.store import RunFolder
from luthier.runs.tensorfile import read_tensors, size_of
from luthier.runs.versions import Migration, migrate

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Checkpoint",
    "bytes_of",
    "checkpoints",
    "gate_finite",
    "load_newest",
    "load_step",
    "preflight",
    "prune",
    "save_checkpoint",
]

FORMAT = "luthier-checkpoint"
VERSION = 1
MIGRATIONS: dict[int, Migration] = {}  # of state.json, from each older version to the next

NAME = re.compile(r"step-(\d{8,})(?:-r([2-9]\d*|1\d+))?")
SPARE_BYTES = 1 << 20  # for what a save needs besides the tensors: headers, state.json, folders


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint whose every byte has been verified.

    Attributes:
        path, step: where and when.
        state: what `save_checkpoint` was given.
        event_rows: how many rows events.jsonl held; `run.truncate_events(after=...)` goes back to there.
        tensors: file stem ("adapter", "optimizer", "method") -> name -> tensor, on the CPU.
        extra: files in its folder that the manifest does not name; they were not read.
    """

    path: Path
    step: int
    state: dict[str, Any]
    event_rows: int
    tensors: dict[str, dict[str, "Tensor"]] = field(repr=False)
    extra: tuple[str, ...] = ()


# --- save ------------------------------------------------------------------------------------------------------------


def save_checkpoint(
    run: RunFolder,
    step: int,
    tensors: Mapping[str, Mapping[str, "Tensor"]],
    state: Mapping[str, Any],
    *,
    keep_best: int | None = None,
) -> Checkpoint:
    """Write a checkpoint; when this returns, it survives a power loss. The rows of events.jsonl are made to last first.

    A full disk is answered by pruning down to the last two (and the best) and one more try.

    Args:
        run: its lock must be held.
        step: optimizer steps done.
        tensors: file stem -> name -> tensor. Only what is trained and what the optimiser and the method remember.
        state: plain values; finite numbers only.
        keep_best: the step of the best checkpoint so far, which pruning for room must spare.

    Raises:
        Diverged: a tensor holds NaN or infinity (F21, R7). Nothing is written.
        ConfigError: a tensor of a type that cannot be stored.
        DiskFull, ResourceError: it cannot be written; earlier checkpoints are untouched.
    """
    for stem, group in tensors.items():
        gate_finite(group, f"step {step}, {stem}")
    with durable.scope("save"):
        run.flush()
        try:
            return _save(run, step, tensors, state)
        except DiskFull:
            if not prune(run, keep_last=2, keep_best=keep_best, powers_of_two=False):
                raise
            return _save(run, step, tensors, state)


def _save(
    run: RunFolder, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], state: Mapping[str, Any]
) -> Checkpoint:
    name, revision = f"step-{step:08d}", 1
    while (run.ckpt / name).exists():
        revision += 1
        name = f"step-{step:08d}-r{revision}"
    target = run.ckpt / name
    rows = run.n_rows()
    with durable.folder(target, {"format": FORMAT, "version": VERSION, "name": name}) as draft:
        # The largest first: its digest takes longest, and runs beside the writing of the others.
        for stem, group in sorted(tensors.items(), key=lambda item: -size_of(item[1])):
            draft.write_tensors(f"{stem}.safetensors", group)
        draft.write_json("state.json", {"step": step, "event_rows": rows, "state": dict(state)})
    _verified[target] = _signature(target)  # written and digested by us a moment ago, and fsynced since
    return Checkpoint(target, step, dict(state), rows, {stem: dict(group) for stem, group in tensors.items()})


def gate_finite(tensors: Mapping[str, "Tensor"], where: str, error: type[LuthierError] = Diverged) -> None:
    """Refuse NaN and infinity, naming the tensor.

    Args:
        where: what the tensors belong to, for the message.
        error: the class to raise; `ModelError` or `IntegrityError` for what was read, `Diverged` for what was trained.

    Raises:
        Diverged: (or `error`) the first such tensor, with how many of its numbers are not finite.
    """
    for name, tensor in tensors.items():
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.numel() == 0:
            continue
        # One pass that keeps nothing: a sum with NaN or infinity in it is never finite. A finite sum settles it; a sum
        # that overflowed does not, and is looked at number by number.
        if tensor.element_size() > 1 and bool(tensor.detach().sum().isfinite()):
            continue
        exact = tensor.detach().float() if tensor.element_size() == 1 else tensor.detach()
        n_bad = int((~exact.isfinite()).sum())
        if n_bad:
            raise error(
                f"{where}: tensor {name!r} holds {n_bad} of {tensor.numel()} numbers that are NaN or infinite."
                " It is not kept; go back to the last checkpoint and lower the learning rate, or look at the data."
            )


def preflight(run: RunFolder, bytes_needed: int) -> None:
    """Refuse before step 1 when the disk cannot hold what the run will write (F09).

    Raises:
        DiskFull: names what is needed and what is free.
    """
    need, have = bytes_needed + SPARE_BYTES, shutil.disk_usage(run.path).free
    if have < need:
        raise DiskFull(
            f"{run.path}: the checkpoints need {human_bytes(need)}, and the disk has {human_bytes(have)} free."
            " Free some space, or choose --out on another disk."
        )


def bytes_of(tensors: Mapping[str, Mapping[str, "Tensor"]]) -> int:
    """What one checkpoint of these tensors takes on the disk, for `preflight`: at least two are kept at once."""
    return sum(size_of(group) for group in tensors.values()) + SPARE_BYTES // 4


# --- load ------------------------------------------------------------------------------------------------------------


def checkpoints(run: RunFolder) -> list[Path]:
    """All candidates, newest first, verified or not."""
    found = [p for p in run.ckpt.iterdir() if NAME.fullmatch(p.name)] if run.ckpt.is_dir() else []
    return sorted(found, key=_age_key, reverse=True)


def load_newest(run: RunFolder) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """The newest checkpoint that verifies, and those that were skipped with the reason.

    When the run's lock is held, leftovers of killed saves are removed and what was skipped is recorded as events.

    Returns:
        None as the first part only if there is no candidate at all: then the run has to start at step 0.

    Raises:
        IntegrityError: there are candidates and none verifies (the run must not start again over them), or one is of
            a newer format.
    """
    with durable.scope("load"):
        if run.lock.held:
            left = durable.sweep(run.ckpt)
            if left:
                run.event("leftovers_removed", names=left)
        skipped: list[tuple[Path, str]] = []
        candidates = checkpoints(run)
        for path in candidates:
            try:
                checkpoint = _load(path)
            except Damaged as bad:
                skipped.append((path, str(bad)))
                if run.lock.held:
                    run.event("checkpoint_skipped", name=path.name, reason=str(bad))
                continue
            if checkpoint.extra and run.lock.held:
                run.event("extra_files_ignored", name=path.name, files=list(checkpoint.extra))
            return checkpoint, skipped
    if candidates:
        reasons = "\n".join(f"  {path.name}: {reason}" for path, reason in skipped)
        raise IntegrityError(
            f"{run.ckpt}: none of the {len(candidates)} checkpoints verifies, and the run does not start again over"
            f" them.\n{reasons}\nRestore one from a copy, or start a new run with another --out."
        )
    return None, skipped


def load_step(run: RunFolder, step: int) -> Checkpoint | None:
    """The newest checkpoint of one step that verifies; None if there is none.

    Raises:
        IntegrityError: it is of a newer format.
    """
    for path in checkpoints(run):
        if _age_key(path)[0] == step:
            with contextlib.suppress(Damaged):
                return _load(path)
    return None


def _load(path: Path) -> Checkpoint:
    found = _verify(path)
    state = json.loads(found.files["state.json"].decode())
    state = migrate({**state, "version": found.facts["version"]}, VERSION, MIGRATIONS, path)
    tensors = {
        name.removesuffix(".safetensors"): read_tensors(content)
        for name, content in found.files.items()
        if name.endswith(".safetensors")
    }
    return Checkpoint(path, state["step"], state["state"], state["event_rows"], tensors, found.extra)


def _verify(path: Path) -> Verified:
    """Read a checkpoint's files and hold them against its manifest.

    Raises:
        Damaged: its bytes are not what they claim to be.
        IntegrityError: whole, but of a format that this version does not know.
    """
    found = read_verified(path)
    if found.facts.get("format") != FORMAT or found.facts.get("name") != path.name or "state.json" not in found.files:
        raise Damaged(f"{durable.MANIFEST} belongs to {found.facts.get('format')} {found.facts.get('name')}")
    migrate({"version": found.facts.get("version")}, VERSION, dict.fromkeys(MIGRATIONS, dict), path)
    return found


# --- keep ------------------------------------------------------------------------------------------------------------

_verified: dict[Path, object] = {}  # checkpoints that this process has written or verified -> their files as they were


def prune(run: RunFolder, keep_last: int = 2, keep_best: int | None = None, powers_of_two: bool = True) -> list[Path]:
    """Remove checkpoints that no rule keeps. Only verified ones count, so damage never lowers the number kept.

    Kept are the last `keep_last`, the one of step `keep_best`, and with `powers_of_two` the oldest of each age from
    2^i to 2^(i+1) steps. Damaged ones go once `keep_last` verified ones exist.

    Returns:
        what was removed.

    Raises:
        ResourceError: something cannot be removed. What is half removed has a `.del-` name and is never read.
    """
    with durable.scope("prune"):
        durable.sweep(run.ckpt)
        candidates = checkpoints(run)
        good = [path for path in candidates if _is_verified(path)]
        if len(good) < keep_last:
            return []
        keep = set(good[:keep_last])
        newest = _age_key(good[0])[0]
        ages: set[int] = set()
        for path in reversed(good):  # the oldest first
            step = _age_key(path)[0]
            if step == keep_best:
                keep.add(path)
            age = (newest - step).bit_length()
            if powers_of_two and age not in ages:
                ages.add(age)
                keep.add(path)
        gone = [path for path in candidates if path not in keep]
        for path in reversed(gone):
            leaving = path.with_name(f".del-{path.name}")
            durable.rename(path, leaving)
            _verified.pop(path, None)
            durable.remove_folder(leaving)
    return gone


def _is_verified(path: Path) -> bool:
    with contextlib.suppress(OSError):
        if path in _verified and _verified[path] == _signature(path):
            return True
    try:
        _verify(path)
    except IntegrityError:
        return False
    _verified[path] = _signature(path)
    return True


def _signature(path: Path) -> object:
    """Changes whenever a file in the folder is written, cut, replaced, added or removed."""
    return sorted(
        (p.name, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p in path.iterdir() if (s := p.lstat())
    )


def _age_key(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)

"""From a specification to a finished run, and on from where one stopped.

prepared   everything that can be refused is refused there: nothing has been written yet
build   the method's edits on the model, with new numbers from keyed generators
loop       trains
finish     the tuning is saved, read back, compared, and scored
drift      what may differ between a run and its resumption
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier import kernels
from luthier.core import ConfigError, Interrupted, Locked, human_bytes, human_seconds, plain
from luthier.data.problems import FILE as PROBLEMS
from luthier.data.problems import problems_csv, problems_said
from luthier.runs import RunFolder, bytes_of, differences, durable, environment, load_newest, preflight
from luthier.runs.spec import RunSpec
from luthier.runs.spec_changes import SAME_BITS, changes
from luthier.runs.store import refuse_place
from luthier.training.allocator import keeping_freed, not_keeping
from luthier.training.loop import Listener, Loop
from luthier.training.recipe import refuse_recipe
from luthier.training.stop_signals import StopRequested, StopSignals
from luthier.workflow.build import build, evaluator_of
from luthier.workflow.finish import Result, finish, record_of, result_of
from luthier.workflow.forecasts import refuse_what_cannot_fit
from luthier.workflow.looks import Looks
from luthier.workflow.preparation import Prepared, prepare
from luthier.workflow.resume_checks import apply, check_changes, compare_fingerprints

__all__ = ["Rung", "default_out", "resume_run", "run_to_end", "train_run"]


@dataclass(frozen=True)
class Rung:
    """A stop after a share of the steps: the run is scored there as it is, and left so that it can go on."""

    share: float

    def of(self, total: int) -> int:
        """The step."""
        return max(1, min(total, round(self.share * total)))


def default_out(spec: RunSpec) -> Path:
    """A free folder below runs/, named after model, data and method."""
    words = [
        Path(spec.model.removeprefix("sample:")).name,
        Path(spec.data.source.removeprefix("sample:")).stem,
        spec.method,
    ]
    stem = "-".join("".join(c if c.isalnum() or c in "._+" else "-" for c in w) for w in words)
    number, path = 1, Path("runs") / stem
    while path.exists():
        number += 1
        path = Path("runs") / f"{stem}-{number}"
    return path


def train_run(
    spec: RunSpec, listener: Listener, *, stop_at: int | Rung | None = None, prepared: Prepared | None = None
) -> Result:
    """One run, from its beginning. See `train`.

    Args:
        stop_at: make only so many optimiser steps, and leave the run unfinished; at a rung it is scored too.

    Raises:
        Any LuthierError: before work starts where it can be known.
    """
    path = Path(spec.out) if spec.out is not None else default_out(spec)
    if prepared is None:
        # Seen before the data are read: such a folder would be refused anyway, minutes later.
        refuse_place(path.absolute())
        prepared = prepare(spec, listener.say)
    started = time.monotonic()
    refuse_what_cannot_fit(prepared)
    loop_of = build(prepared)
    with _create(path, prepared) as run:
        for line in prepared.lines:
            run.event("note", text=line)
        loop = loop_of(run, listener)
        with StopSignals() as loop.signals, _ways(prepared):
            _begin(prepared, loop, run)
            return _run(prepared, loop, run, listener, started, stop_at, because=())


def resume_run(
    path: Path,
    listener: Listener,
    *,
    changed: dict[str, Any] | None = None,
    accept_drift: Sequence[str] = (),
    stop_at: int | Rung | None = None,
) -> Result:
    """Go on with one unfinished run. See `resume`.

    Raises:
        Any LuthierError: it is finished, a field may not change, or something else has changed.
    """
    with RunFolder.open(path) as run:
        if run.finished:
            raise ConfigError(
                f"{path}: this run is finished; there is nothing to resume. Its result is in {path / 'tuning'}."
            )
        old = RunSpec.from_plain({**run.spec, "out": str(path)}, where=f"{path}/run.json")
        spec = apply(old, changed or {})
        checkpoint, skipped = load_newest(run)
        for bad, reason in skipped:
            listener.say(f"checkpoint {bad.name} was skipped: {reason}")
        step = checkpoint.step if checkpoint is not None else 0
        epoch_begins = check_changes(run, old, spec, checkpoint)
        prepared = prepare(spec, listener.say, begun=True)
        because, prints = compare_fingerprints(run, prepared, accept_drift)
        applied = [c for c in changes(old, spec) if c.field != "out"]
        for change in applied:
            listener.say(f"changed and applied from step {step + 1} on: {change}")
        because += [f"changed from step {step + 1} on: {c}" for c in applied if c.field not in SAME_BITS]
        moved = differences(run.read_json("environment.json"), environment(str(prepared.device)))
        because += [m for m in moved if m not in because]
        for line in because:
            listener.say(f"not bit-exact: {line}")
        started = time.monotonic()
        loop = build(prepared)(run, listener)
        with StopSignals() as loop.signals, _ways(prepared):
            if checkpoint is not None:
                loop.load(checkpoint)
                if epoch_begins is not None:
                    # Rows are counted from here on: the next epoch has other steps. Safe before it is recorded, since
                    # at an epoch's beginning the old batch size reads the same rows from it.
                    loop.feed.origin = epoch_begins
                    loop.save()
            else:
                run.truncate_events(0)
                _begin(prepared, loop, run)
            if prints or spec != old:
                said = [*because, *(f"{c}" for c in applied if c.field in SAME_BITS)]
                run.accept_drift(said, prints, step, spec=plain(spec) if spec != old else None)
            earlier = _seconds_before(run)
            run.event("resumed", step=step, bit_exact=not because, because=because)
            return _run(prepared, loop, run, listener, started - earlier, stop_at, because=tuple(because))


def _seconds_before(run: RunFolder) -> float:
    """Seconds of training in the attempts before this one; one that was killed has told nobody."""
    ended = (e for e in run.events() if e.get("event") in ("interrupted", "paused"))
    return float(sum(e.get("seconds", 0.0) for e in ended))


def run_to_end(spec: RunSpec, listener: Listener, stop_at: Rung | None = None) -> Result | None:
    """Start the run of a spec with a folder, or go on with it where it was stopped; a finished one is left alone.

    Args:
        stop_at: go no further than there.

    Returns:
        what came out; None where there was nothing to do.

    Raises:
        Any LuthierError: of `train` or `resume`.
    """
    path = Path(str(spec.out))
    durable.sweep(path.parent, of=path.name)
    if not (path / "run.json").is_file():
        refuse_recipe(spec, "a part of something larger")
        return train_run(spec, listener, stop_at=stop_at)
    if not RunFolder.open(path, write=False).finished:
        return resume_run(path, listener, stop_at=stop_at)
    return None


def _create(path: Path, prepared: Prepared) -> RunFolder:
    """The run's folder. A name of our own choosing that another process was faster to take is followed by the next."""
    spec, prints, device = prepared.spec, prepared.fingerprints, str(prepared.device)
    while True:
        try:
            return RunFolder.create(path, plain(spec), fingerprints=prints, device=device)
        except (ConfigError, Locked):
            if spec.out is not None or not path.exists():
                raise
            path = default_out(spec)


# --- chapters ---------------------------------------------------------------------------------------------------------


def _begin(prepared: Prepared, loop: Loop, run: RunFolder) -> None:
    """What a run does before its first checkpoint; done again where it was killed before that."""
    _write_ledger(run, prepared)
    if prepared.problems:
        durable.write_bytes(run.path / PROBLEMS, problems_csv(prepared.problems))
        loop.listener.say(f"{problems_said(prepared.problems)} ({run.path / PROBLEMS})")
    _check_disk(run, loop)
    if any(m.looks_at_data for m in prepared.method.parts()):
        _look_at_data(prepared, loop)


def _write_ledger(run: RunFolder, prepared: Prepared) -> None:
    run.rows.keep_rows(0)
    for half, examples in (("train", prepared.train), ("select", prepared.selection), ("test", prepared.test)):
        if examples is not None:
            run.rows.append_rows(examples.ledger.lines(half))
    run.rows.append_rows(
        json.dumps({"half": "none", "row": None, "place": place, "status": "refused", "reason": why}).encode() + b"\n"
        for place, why in prepared.aside
    )
    run.rows.flush()


@contextmanager
def _ways(prepared: Prepared) -> Iterator[None]:
    """What `fast` switches on, besides what was attached: fused functions, and on a CPU an allocator that keeps.

    It keeps nothing where activations are computed twice: whoever asks for that has more time than memory.
    """
    fast = prepared.spec.fast and kernels.fast()
    keeps = fast and prepared.device.type == "cpu" and prepared.spec.gradient_checkpointing is not True
    with kernels.plain(not fast), keeping_freed(keeps):
        yield


def _check_disk(run: RunFolder, loop: Loop) -> None:
    one = bytes_of({"adapter": loop.tuned.state.tensors(), "optimizer": loop.optimiser.tensors()})
    preflight(run, one * (loop.spec.checkpoint.keep + 2))


def _look_at_data(prepared: Prepared, loop: Loop) -> None:
    """Let methods that start from data see the first epoch, and leave no trace."""
    batches = Looks(loop)
    for part in prepared.method.parts():
        if part.looks_at_data:
            share = f"{part.settings().get('data', 1.0):.0%} of " if "data" in part.settings() else ""
            loop.listener.say(
                f"{part.name} looks at the data first: {share}the {len(batches)} steps of the first epoch"
            )
            with not_keeping():
                part.prepare(loop.tuned, batches)
    loop.optimiser.zero_grad()


def _run(
    prepared: Prepared, loop: Loop, run: RunFolder, listener: Listener, started: float, stop: int | Rung | None,
    *, because: tuple[str, ...],
) -> Result:  # fmt: skip
    """The loop, then what follows it."""
    stop_at = stop.of(loop.total) if isinstance(stop, Rung) else stop
    if prepared.strategies:  # which may choose its own rows: nothing else in the folder says how far there is to go
        run.event("begins", total=loop.total)
    loop.run_to(stop_at)
    try:
        if stop_at is not None and stop_at <= loop.step < loop.total and not loop.evaluations.selection.enough:
            run.event("paused", step=loop.step, seconds=round(loop.seconds, 3))
            found = _scored_here(prepared, loop) if isinstance(stop, Rung) else {}
            record = record_of(prepared, loop, run, found, 0, "paused", because, loop.seconds)
            return result_of(prepared, loop, run, record, found, 0)
        scores, stored, quality = finish(prepared, loop, run)
    except StopRequested as asked:
        # All training is in the last checkpoint; what follows it is made anew from there.
        run.event("interrupted", step=loop.step, signal=asked.number)
        raise Interrupted(
            f"stopped by signal {asked.number} after the last step, before the scores; nothing is lost. "
            f"Finish with `luthier resume {run.path}`.",
            asked.number,
        ) from None
    seconds = time.monotonic() - started
    record = record_of(prepared, loop, run, scores, stored, "finished", because, seconds)
    run.event("finished", step=loop.step, seconds=round(seconds, 3))
    run.write_json("record.json", record.to_json())
    listener.say(
        f"{human_seconds(loop.seconds)} training, {loop.rows_seen / max(loop.seconds, 1e-9):.0f} rows/s, peak memory "
        f"{human_bytes(record.peak_bytes or 0)}; saved {human_bytes(stored)} in {run.tuning}"
    )
    return result_of(prepared, loop, run, record, scores, stored, quality)


def _scored_here(prepared: Prepared, loop: Loop) -> dict[str, float]:
    """Scores of the held-out rows between two steps. All is in the checkpoint by then, so this leaves no trace."""
    if prepared.test is None:
        return {}
    loop.set_mode(training=False)
    evaluator = evaluator_of(prepared, loop, prepared.test)
    return evaluator.scores_of(evaluator.outputs())

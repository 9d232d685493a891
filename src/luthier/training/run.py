"""From a specification to a finished run, and on from where one stopped.

prepare   everything that can be refused is refused here: nothing has been written yet
attach    the method's edits on the model, with new numbers from keyed generators
train     the loop
finish    the tuning is saved, read back, compared, and scored
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier import kernels
from luthier.__version__ import __version__
from luthier.anatomy import Anatomy
from luthier.core import (
    ConfigError,
    IntegrityError,
    Interrupted,
    ModelError,
    NothingTrains,
    human_bytes,
    human_count,
    human_seconds,
    key,
    plain,
)
from luthier.runs import (
    Checkpoint,
    Record,
    RunFolder,
    bytes_of,
    differences,
    durable,
    environment,
    load_newest,
    load_step,
    peak_bytes,
    preflight,
    reset_peak,
    resident_bytes,
)
from luthier.surgery import Method, Tuned, attach, compose, tuning
from luthier.training.batches import Batches, Collator, EvalBatches, Order, shuffled
from luthier.training.chat import ChatTemplate
from luthier.training.columns import Columns
from luthier.training.data import load_data
from luthier.training.encode import Examples, choose_length, choose_pad, encode
from luthier.training.evaluate import Evaluator, plain_scores
from luthier.training.load import Source, empty_model, find_model, load_config, load_model, load_tokenizer
from luthier.training.loop import Listener, Loop
from luthier.training.objective import Objective
from luthier.training.optimiser import Optimiser
from luthier.training.precision import Precision, choose_device, choose_precision
from luthier.training.rows import Table, split_rows
from luthier.training.selection import Selection
from luthier.training.signals import Asked, StopSignals
from luthier.training.spec import SAME_BITS, RunSpec, changes
from luthier.training.tasks import Task

__all__ = ["Prepared", "Result", "prepare", "resume", "train", "verify_resume"]

_LANGUAGE_ROWS = 200  # a language model's rows are long: all of them can take longer than training


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything a run needs, checked, before anything is written or trained."""

    spec: RunSpec
    source: Source
    method: Method
    task: Task
    columns: Columns
    train_table: Table
    test_table: Table | None
    tokenizer: Any = field(repr=False)
    train: Examples
    selection: Examples | None  # training rows held out to select by; the test half has no part in that
    test: Examples | None
    pad_id: int
    pad: dict[str, Any]
    max_length: int
    n_params: int
    n_base: int
    precision: Precision
    device: torch.device
    weights: torch.dtype
    fingerprints: dict[str, str]
    lines: tuple[str, ...]

    @property
    def template(self) -> ChatTemplate | None:
        """The chat template of a language task with turns."""
        language = self.task.name == "causal_lm" and self.columns.shape != "plain"
        return ChatTemplate.of(self.tokenizer) if language else None


@dataclass(frozen=True, kw_only=True)
class Result:
    """A finished run: its folder, its record, and the model as it was saved."""

    path: Path
    record: Record
    scores: dict[str, float]
    tuned: Tuned = field(repr=False)
    tokenizer: Any = field(repr=False)
    seconds: float
    peak_bytes: int | None
    stored_bytes: int
    memory: dict[str, int]
    n_params: int
    n_base: int


def prepare(spec: RunSpec, say: Callable[[str], None] = lambda line: None) -> Prepared:
    """Read data and model structure, and refuse what cannot work. Writes nothing.

    Raises:
        Any LuthierError: names value, place and what to do.
    """
    if spec.threads is not None:
        torch.set_num_threads(spec.threads)
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        say(line)

    method = compose.method(spec.method, spec.settings)
    device = choose_device(spec.device)
    precision = choose_precision(spec.precision, device)
    source = find_model(spec.model)
    config = load_config(source)
    data = load_data(spec.data, spec.task, config)
    table, test, columns, task = data.train, data.test, data.columns, data.task
    for remark in data.notes:
        note(remark)
    select = None
    if spec.eval.selects:
        by_class = task.name == "classification" and not task.multi_label
        table, select = split_rows(
            table, spec.eval.share, key(spec.data.split_seed, "select"), columns.content,
            columns.outcome if by_class else None,
        )  # fmt: skip
        assert select is not None
        note(f"{len(select)} training rows are held out to select by; the test half is scored once, at the end")
    if spec.eval.metric is not None:
        task.check_metric(spec.eval.metric)
    most = spec.eval.rows or (_LANGUAGE_ROWS if task.name in ("causal_lm", "seq2seq") else None)
    if test is not None and most is not None and len(test) > most:
        note(f"scores are of {most} of the {len(test)} test rows (eval.rows)")
        test = test.take(np.sort(shuffled(len(test), spec.data.split_seed, "scored")[:most]).tolist())
    tokenizer = load_tokenizer(source)
    empty = empty_model(source, task)
    anatomy = Anatomy.read(empty)
    n_params = method.n_params(anatomy)
    edits = list(method.edits(anatomy))
    reserved = sum(getattr(e, "length", 0) for e in edits if type(e).__name__ == "PrependTokens")
    if n_params == 0 and not anatomy.head_tensors:
        raise NothingTrains(f"{spec.method} trains no number of {source.name}. Choose another method.")
    n_vocab = int(empty.get_input_embeddings().weight.shape[0])
    max_length = choose_length(spec.max_length, tokenizer, config, task, reserved)
    pad = choose_pad(tokenizer, n_vocab)
    options: dict[str, Any] = {"n_vocab": n_vocab, "max_length": max_length, "loss_on": spec.data.loss_on}
    train_examples = encode(table, columns, task, tokenizer, accept_refused=spec.data.accept_refused, **options)
    note(train_examples.ledger.sentence())
    for remark in train_examples.ledger.notes:
        note(remark)
    select_examples = None
    if select is not None:
        select_examples = encode(select, columns, task, tokenizer, accept_refused=spec.data.accept_refused, **options)
    test_examples = None
    if test is not None:
        test_examples = encode(test, columns, task, tokenizer, accept_refused=spec.data.accept_refused, **options)
        note(test_examples.ledger.sentence())
    note(precision.sentence())
    # Where most of the model trains, its weights are the fp32 masters; elsewhere the frozen base is stored small.
    mostly = n_params > anatomy.n_params // 2
    weights = torch.float32 if mostly else precision.dtype
    note(
        f"method {spec.method}: trains {human_count(n_params)} of {human_count(anatomy.n_params)} numbers "
        f"({n_params / anatomy.n_params:.3%}), and a new head of "
        f"{human_count(sum(int(np.prod(anatomy.tensors[t])) for t in anatomy.head_tensors))}"
    )
    return Prepared(
        spec=spec, source=source, method=method, task=task, columns=columns, train_table=table, test_table=test,
        tokenizer=tokenizer, train=train_examples, selection=select_examples, test=test_examples, pad_id=pad.id,
        pad=plain(pad), max_length=max_length, n_params=n_params, n_base=anatomy.n_params, precision=precision,
        device=device, weights=weights, lines=tuple(lines),
        fingerprints={
            "model": source.digest,
            "train": table.fingerprint(),
            "select": select.fingerprint() if select is not None else "",
            "test": test.fingerprint() if test is not None else "",
            "tokenizer": _tokenizer_digest(tokenizer),
            "luthier": __version__,
        },
    )  # fmt: skip


def _tokenizer_digest(tokenizer: Any) -> str:
    summed = hashlib.sha256()
    for word, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        summed.update(f"{number}\t{word}\n".encode(errors="surrogatepass"))
    summed.update(repr(sorted(tokenizer.special_tokens_map.items())).encode())
    return summed.hexdigest()


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


def train(
    spec: RunSpec, *, listener: Listener | None = None, stop_at: int | None = None, prepared: Prepared | None = None
) -> Result:
    """Fine-tune as the spec says, into a new folder.

    Args:
        stop_at: make only so many optimiser steps, and leave the run unfinished; `resume` goes on.

    Raises:
        Any LuthierError: before work starts where it can be known; the folder keeps the last good checkpoint.
    """
    listener = listener or Listener()
    path = Path(spec.out) if spec.out is not None else default_out(spec)
    if prepared is None:
        # Seen before the data are read: an occupied folder would be refused anyway, minutes later.
        _refuse_occupied(path)
        prepared = prepare(spec, listener.say)
    started = time.monotonic()
    loop_of = _attach(prepared)
    fingerprints = prepared.fingerprints
    with RunFolder.create(path, plain(spec), fingerprints=fingerprints, device=str(prepared.device)) as run:
        for line in prepared.lines:
            run.event("note", text=line)
        _write_ledger(run, prepared)
        loop = loop_of(run, listener)
        with StopSignals() as loop.signals, kernels.plain(not spec.fast or not kernels.fast()):
            _begin(prepared, loop, run)
            return _run(prepared, loop, run, listener, started, stop_at, because=())


def resume(
    path: Path | str,
    *,
    changed: dict[str, Any] | None = None,
    accept_drift: Sequence[str] = (),
    listener: Listener | None = None,
    stop_at: int | None = None,
) -> Result:
    """Go on with an unfinished run, to the bit where nothing has changed.

    Args:
        changed: dotted spec fields to change, such as {"optim.lr": 1e-4}; each is applied or refused, none ignored.
        accept_drift: of "data", "model", "tokenizer": go on although it has changed since; recorded in the folder.

    Raises:
        ConfigError: the run is finished, or a field may not change.
        IntegrityError: data, model or tokenizer have changed, or no checkpoint verifies.
        Locked: another process is at it.
    """
    listener = listener or Listener()
    path = Path(path)
    with RunFolder.open(path) as run:
        if run.finished:
            raise ConfigError(
                f"{path}: this run is finished; there is nothing to resume. Its result is in {path / 'tuning'}."
            )
        old = RunSpec.from_plain({**run.spec, "out": str(path)}, where=f"{path}/run.json")
        spec = _apply(old, changed or {})
        checkpoint, skipped = load_newest(run)
        for bad, reason in skipped:
            listener.say(f"checkpoint {bad.name} was skipped: {reason}")
        step = checkpoint.step if checkpoint is not None else 0
        epoch_begins = _check_changes(run, old, spec, checkpoint)
        prepared = prepare(spec, listener.say)
        because, prints = _compare(run, prepared, accept_drift)
        applied = [c for c in changes(old, spec) if c.field != "out"]
        for change in applied:
            listener.say(f"changed and applied from step {step + 1} on: {change}")
        because += [f"changed from step {step + 1} on: {c}" for c in applied if c.field not in SAME_BITS]
        moved = differences(run.read_json("environment.json"), environment(str(prepared.device)))
        because += [m for m in moved if m not in because]
        for line in because:
            listener.say(f"not bit-exact: {line}")
        started = time.monotonic()
        loop = _attach(prepared)(run, listener)
        with StopSignals() as loop.signals, kernels.plain(not spec.fast or not kernels.fast()):
            if checkpoint is not None:
                loop.load(checkpoint)
                if epoch_begins is not None:
                    # Rows are counted from here on: the next epoch has other steps. Safe before it is recorded, since
                    # at an epoch's beginning the old batch size reads the same rows from it.
                    loop.origin = epoch_begins
                    loop.save()
            else:
                run.truncate_events(0)
                _begin(prepared, loop, run)
            if prints or spec != old:
                said = [*because, *(f"{c}" for c in applied if c.field in SAME_BITS)]
                run.accept_drift(said, prints, step, spec=plain(spec) if spec != old else None)
            run.event("resumed", step=step, bit_exact=not because, because=because)
            return _run(prepared, loop, run, listener, started, stop_at, because=tuple(because))


def _refuse_occupied(path: Path) -> None:
    from luthier.runs import store

    store._refuse_occupied(path.absolute())


def _apply(spec: RunSpec, changed: dict[str, Any]) -> RunSpec:
    values = plain(spec)
    for name, value in changed.items():
        at = values
        *parents, last = name.split(".")
        for parent in parents:
            at = at.get(parent) if isinstance(at, dict) else None
            if not isinstance(at, dict):
                raise ConfigError(f"{name!r} is no field of a run. `luthier train --help` lists them.")
        if last not in at:
            raise ConfigError(f"{name!r} is no field of a run; beside it there are {', '.join(at)}.")
        at[last] = value
        if name == "epochs" and value is not None:
            values["steps"] = None
        if name == "steps" and value is not None:
            values["epochs"] = None
    return RunSpec.from_plain(values)


def _compare(run: RunFolder, prepared: Prepared, accepted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Fingerprints of then and now; refuse what differs and was not accepted.

    Returns:
        a sentence for each difference, and the fingerprints that hold from now on.
    """
    words = {"train": "data", "select": "data", "test": "data", "model": "model", "tokenizer": "tokenizer"}
    differs = [n for n, now in prepared.fingerprints.items() if run.fingerprints.get(n) != now]
    refused = [n for n in differs if n in words and words[n] not in accepted]
    if refused:
        named = list(dict.fromkeys(words[n] for n in refused))
        raise IntegrityError(
            f"{run.path}: {', '.join(named)} changed since the run began ({', '.join(refused)}). Restore what it was, "
            f"or go on with {' '.join(f'--accept-drift {n}' for n in named)}, which is recorded in the folder."
        )
    said = [f"{words[n]} changed since the run began ({n}): accepted" for n in differs if n in words]
    if "luthier" in differs:
        said.append(f"luthier {run.fingerprints.get('luthier')} -> {prepared.fingerprints['luthier']}")
    return said, {n: prepared.fingerprints[n] for n in differs}


def _check_changes(run: RunFolder, old: RunSpec, new: RunSpec, checkpoint: Checkpoint | None) -> tuple[int, int] | None:
    """Hold every changed field against its rule.

    Returns:
        (epoch, step) from which rows are counted anew, where a field that changes the steps of an epoch has changed.

    Raises:
        ConfigError: a field that may not change, or not here.
    """
    begins = None
    for change in changes(old, new):
        if change.field == "out":
            continue
        if change.rule == "exact":
            raise ConfigError(
                f"{change}: a resumed run must keep {change.field}; with another it would be another run. "
                "Start a new one with `luthier train`."
            )
        if change.rule == "boundary" and checkpoint is not None:
            state, per_epoch = checkpoint.state, int(checkpoint.state["steps_per_epoch"])
            epoch, first = state["origin"]
            epochs, inside = divmod(checkpoint.step - first, per_epoch)
            if inside:
                raise ConfigError(
                    f"{change}: may change only where an epoch begins; this run is at step {checkpoint.step}, the next "
                    f"epoch begins at {checkpoint.step - inside + per_epoch}. Leave {change.field} as it was."
                )
            begins = (int(epoch) + epochs, checkpoint.step)
    return begins


# --- chapters ---------------------------------------------------------------------------------------------------------


def _attach(prepared: Prepared) -> Callable[[RunFolder, Listener], Loop]:
    """Load, attach, and give what makes the loop once there is a folder. Still nothing is written."""
    spec = prepared.spec
    reset_peak()
    program = resident_bytes()  # Python, its libraries and the encoded rows, before any weight is there
    model, fresh = load_model(
        prepared.source, prepared.task, dtype=prepared.weights, device=prepared.device, seed=spec.seed
    )
    model.config.pad_token_id = prepared.pad_id
    _check_finite(model, prepared.source.name)
    method = prepared.method
    tuned = attach(model, method, seed=spec.seed, new_tensors=fresh)
    if spec.fast:
        tuned.route_attention()
        tuned.quicken()
    if spec.gradient_checkpointing:
        tuned.checkpoint_activations()
    needs_logits = any(getattr(m, "needs_logits", False) for m in method.parts())
    objective = Objective(tuned, prepared.task, full_logits=needs_logits)
    order = Order(prepared.train.lengths, spec.batch.size, spec.seed, spec.batch.group_by_length)
    start = getattr(model.config, "decoder_start_token_id", None) if prepared.task.name == "seq2seq" else None
    collator = Collator(pad_id=prepared.pad_id, pad_to=spec.batch.pad_to, decoder_start=start)
    batches = Batches(prepared.train, order, collator, spec.batch.tokens, spec.batch.accumulate, spec.batch.workers)
    optimiser = Optimiser(tuned.trained(), tuned.groups(), spec.optim, spec.optim.lr or method.default_lr)
    trains_base = any(m.trains_base for m in method.parts())
    metric = spec.eval.metric or prepared.task.headline
    every = spec.eval.every
    if every is None:
        every = order.steps_per_epoch if spec.eval.selects else 0

    def make(run: RunFolder, listener: Listener) -> Loop:
        loop = Loop(
            spec=spec, tuned=tuned, objective=objective, batches=batches, optimiser=optimiser,
            precision=prepared.precision, device=prepared.device, run=run, evaluator=None, eval_every=every,
            selection=Selection(spec.eval, metric), place=lambda row: prepared.train_table.places[row],
            identity={"spec": spec.digest(), "method": compose.spell(method), "model": prepared.source.digest},
            trunk_dropout=spec.trunk_dropout == "on" or (spec.trunk_dropout == "auto" and trains_base),
            listener=listener,
            program_bytes=program,
        )  # fmt: skip
        # What nothing selects by may be looked at: without best or patience these are the test rows.
        looked_at = prepared.selection if spec.eval.selects else prepared.test
        if every and looked_at is not None:
            loop.evaluator = _evaluator(prepared, loop, looked_at)
        return loop

    return make


def _evaluator(prepared: Prepared, loop: Loop, examples: Examples) -> Evaluator:
    tokens = 2 * prepared.spec.batch.tokens
    objective = Objective(loop.tuned, prepared.task, scoring=True)
    if prepared.task.name in ("causal_lm", "seq2seq") and not objective.chunked:
        # Where all logits of a batch are held at once: 2^26 of them are 256 MiB in fp32.
        tokens = max(1, min(tokens, 2**26 // int(loop.tuned.model.get_input_embeddings().weight.shape[0])))
    return Evaluator(
        loop.tuned, objective,
        EvalBatches(examples, loop.batches.collator, tokens), prepared.precision, prepared.device,
        lambda: loop.signals.check(),
    )  # fmt: skip


def _check_finite(model: Any, name: str) -> None:
    for tensor_name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not torch.isfinite(parameter.detach()).all():
            raise ModelError(f"{name}: tensor {tensor_name} holds NaN or infinity. Use an undamaged copy of the model.")


def _begin(prepared: Prepared, loop: Loop, run: RunFolder) -> None:
    """What a run does before its first checkpoint; done again where it was killed before that."""
    _write_ledger(run, prepared)
    _check_disk(run, loop)
    if any(m.looks_at_data for m in prepared.method.parts()):
        _look_at_data(prepared, loop)


def _write_ledger(run: RunFolder, prepared: Prepared) -> None:
    run.rows.keep_rows(0)
    for half, examples in (("train", prepared.train), ("select", prepared.selection), ("test", prepared.test)):
        if examples is not None:
            for row in examples.ledger:
                run.rows.append({"half": half, **row}, fact=False)
    run.rows.flush()


def _check_disk(run: RunFolder, loop: Loop) -> None:
    one = bytes_of({"adapter": loop.tuned.state_tensors(), "optimizer": loop.optimiser.tensors()})
    preflight(run, one * (loop.spec.checkpoint.keep + 2))


def _look_at_data(prepared: Prepared, loop: Loop) -> None:
    """Let methods that start from data see the first batches, in eval mode, and leave no trace."""
    loop.listener.say(f"{prepared.spec.method} looks at the data first")
    batches = _Looks(loop)
    for part in prepared.method.parts():
        if part.looks_at_data:
            part.prepare(loop.tuned, batches)
    loop.optimiser.zero_grad()


class _Looks(Sequence[Callable[[], Tensor]]):
    """The first epoch's micro-batches as callables: each gives its mean loss, with a graph."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        steps = loop.batches.order.steps_per_epoch
        self._pieces = [p for s in range(min(steps, 64)) for p in loop.batches.pieces(0, s)]

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        loop = self._loop

        def look() -> Tensor:
            loop.signals.check()
            batch = loop.batches.collator(loop.batches.examples, self._pieces[index]).to(loop.device)
            with loop.precision.autocast(loop.device):
                result = loop.objective(batch)
            return result.loss / max(1, batch.n_targets)

        return look


def _run(
    prepared: Prepared, loop: Loop, run: RunFolder, listener: Listener, started: float, stop_at: int | None,
    *, because: tuple[str, ...],
) -> Result:  # fmt: skip
    """The loop, then what follows it."""
    loop.run_to(stop_at)
    if stop_at is not None and stop_at <= loop.step < loop.total and not loop.selection.enough:
        run.event("paused", step=loop.step, seconds=round(loop.seconds, 3))
        record = _record(prepared, loop, run, {}, 0, "paused", because)
        return _result(prepared, loop, run, record, {}, 0)
    try:
        scores, stored = _finish(prepared, loop, run)
    except Asked as asked:
        # All training is in the last checkpoint; what follows it is made anew from there.
        run.event("interrupted", step=loop.step, signal=asked.number)
        raise Interrupted(
            f"stopped by signal {asked.number} after the last step, before the scores; nothing is lost. "
            f"Finish with `luthier resume {run.path}`.",
            asked.number,
        ) from None
    seconds = time.monotonic() - started
    record = _record(prepared, loop, run, scores, stored, "finished", because, seconds)
    run.event("finished", step=loop.step, seconds=round(seconds, 3))
    run.write_json("record.json", record.to_json())
    listener.say(
        f"{human_seconds(loop.seconds)} training, {loop.rows_seen / max(loop.seconds, 1e-9):.0f} rows/s, peak memory "
        f"{human_bytes(record.peak_bytes or 0)}; saved {human_bytes(stored)} in {run.tuning}"
    )
    return _result(prepared, loop, run, record, scores, stored)


def _finish(prepared: Prepared, loop: Loop, run: RunFolder) -> tuple[dict[str, float], int]:
    """The result: chosen, brought into its stored form, refused where it is none, saved, read back, scored."""
    _take_best(loop, run)
    loop._mode(training=False)
    loop.tuned.finish()
    loop.signals.check()
    _refuse_base(prepared, loop)
    stored = _save(prepared, loop.tuned, run)
    scores = _evaluator(prepared, loop, prepared.test).scores() if prepared.test is not None else {}
    if scores:
        run.event("scores", lasting=False, step=loop.step, **plain_scores(scores, 6))
        loop.listener.scores(loop.step, scores)
    run.flush()
    run.write_json("scores.json", plain_scores(scores))
    return scores, stored


def _take_best(loop: Loop, run: RunFolder) -> None:
    """Put the best evaluation's tensors back, where the spec asks for the best and it was not the last."""
    best = loop.selection.kept
    if best is None or best == loop.step:
        return
    found = load_step(run, best)
    if found is None:
        raise IntegrityError(
            f"{run.ckpt}: the checkpoint of the best step, {best}, is gone or damaged. Restore it from a copy, or "
            "start a new run."
        )
    loop.tuned.load_state_tensors(found.tensors["adapter"])
    run.event("best_taken", step=best, value=loop.selection.best_value)


def _refuse_base(prepared: Prepared, loop: Loop) -> None:
    """Nothing that equals its base may be called a result."""
    # A few short rows: all logits of the longest batch of a language model would be the run's highest memory.
    lengths = prepared.train.lengths
    short = np.argsort(lengths, kind="stable")[: max(1, min(8, 256 // max(1, int(lengths.min()))))].astype(np.int64)
    batch = loop.batches.collator(prepared.train, short).to(loop.device)
    with torch.inference_mode(), prepared.precision.autocast(loop.device):
        model = loop.tuned.model
        tuned_output = model(**batch.inputs)[0].float()
        with loop.tuned.base_only():
            base = model(**batch.inputs)[0].float()
    if torch.equal(tuned_output, base):
        raise NothingTrains(
            "after training the model computes exactly what its base computes: nothing was learnt, nothing is saved."
        )
    if not torch.isfinite(tuned_output).all():
        raise IntegrityError(
            "the trained model's outputs are not finite; it is not saved. Resume with a lower learning rate."
        )


def _save(prepared: Prepared, tuned: Tuned, run: RunFolder) -> int:
    """Write the tuning with its contract, read it back, and compare."""
    if run.tuning.exists():
        # Of an attempt that was stopped before its scores. It is the same one, unless the spec has changed since.
        leaving = run.tuning.with_name(f".del-{run.tuning.name}")
        durable.rename(run.tuning, leaving)
        durable.remove_folder(leaving)
    about: dict[str, Any] = {
        "task": {**plain(prepared.task), "columns": plain(prepared.columns)},
        "labels": list(prepared.task.labels),
        "precision": prepared.precision.name,
        "contract": {
            "max_length": prepared.max_length,
            "pad": prepared.pad,
            "tokenizer": prepared.fingerprints["tokenizer"],
            "template": plain(prepared.template) if prepared.template is not None else None,
            "loss_on": prepared.spec.data.loss_on,
            "weights": "fp32" if prepared.weights == torch.float32 else prepared.precision.name,
        },
    }
    tuned.save(run.tuning, about=about)
    from luthier.trust import safetensors

    held = tuning.stored_tensors(tuned.tuning())
    found = safetensors.read(run.tuning / "tuning.safetensors", digest=tuning.weights_digest(run.tuning))
    differs = [n for n in held if n not in found or not torch.equal(held[n], found[n])]
    if differs or set(found) != set(held):
        raise IntegrityError(
            f"{run.tuning}: {', '.join(differs[:3])} read back otherwise than written. The disk is at fault."
        )
    return sum(p.stat().st_size for p in run.tuning.iterdir())


def _record(
    prepared: Prepared, loop: Loop, run: RunFolder, scores: dict[str, float], stored: int, status: str,
    because: tuple[str, ...], seconds: float = 0.0,
) -> Record:  # fmt: skip
    return Record(
        spec=plain(prepared.spec),
        environment=environment(str(prepared.device)),
        scores={k: float(v) for k, v in scores.items() if math.isfinite(v)},
        seconds=seconds,
        peak_bytes=_peak(loop.device),
        trained=prepared.n_params,
        stored=stored,
        status=status,
        bit_exact=not because,
        because=because,
    )


def _peak(device: torch.device) -> int | None:
    return int(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else peak_bytes()


def _result(
    prepared: Prepared, loop: Loop, run: RunFolder, record: Record, scores: dict[str, float], stored: int
) -> Result:
    base = sum(p.numel() * p.element_size() for p in loop.tuned.model.parameters() if not p.requires_grad)
    trained = sum(p.numel() * p.element_size() for p in loop.optimiser.named.values())
    parts = {"base": base, "trained": trained, "gradients": trained, "optimiser": 2 * trained}
    memory = {"program": loop.program_bytes, **parts}
    memory["activations and workspace"] = max(0, (record.peak_bytes or 0) - sum(memory.values()))
    return Result(
        path=run.path, record=record, scores=scores, tuned=loop.tuned, tokenizer=prepared.tokenizer,
        seconds=loop.seconds, peak_bytes=record.peak_bytes, stored_bytes=stored, memory=memory,
        n_params=prepared.n_params, n_base=prepared.n_base,
    )  # fmt: skip


def verify_resume(spec: RunSpec, steps: int, folder: Path, *, listener: Listener | None = None) -> dict[str, Any]:
    """Prove on the user's own run that resuming changes nothing: 2 N steps against N and N, digests compared.

    Returns:
        for each file of state its two digests, and `equal`.
    """
    whole = replace(spec, steps=2 * steps, epochs=None, out=str(folder / "whole"))
    halves = replace(whole, out=str(folder / "halves"))
    train(whole, listener=listener)
    train(halves, listener=listener, stop_at=steps)
    resume(folder / "halves", listener=listener)
    digests = {name: run_digests(folder / name) for name in ("whole", "halves")}
    rows = {part: {"whole": digests["whole"][part], "resumed": digests["halves"][part]} for part in digests["whole"]}
    return {"steps": 2 * steps, "parts": rows, "equal": digests["whole"] == digests["halves"]}


def run_digests(path: Path) -> dict[str, str]:
    """sha256 of a run's tuning, of its last state's tensors, and of its log's rows.

    Raises:
        ConfigError: no run, or one without a checkpoint.
        IntegrityError: no checkpoint verifies.
    """
    run = RunFolder.open(path, write=False)
    checkpoint, _ = load_newest(run)
    if checkpoint is None:
        raise ConfigError(f"{path}: this run has no checkpoint yet. Let it go on with `luthier resume {path}`.")
    found = {}
    for stem, tensors in checkpoint.tensors.items():
        summed = hashlib.sha256()
        for name in sorted(tensors):
            summed.update(name.encode())
            summed.update(tensors[name].detach().contiguous().flatten().view(torch.uint8).numpy().data)
        found[stem] = summed.hexdigest()
    weights = run.tuning / "tuning.safetensors"
    found["tuning"] = hashlib.sha256(weights.read_bytes()).hexdigest() if weights.exists() else ""
    rows = [repr(e) for e in run.events() if "at" not in e]
    found["log"] = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    return found

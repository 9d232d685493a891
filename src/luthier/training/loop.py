"""The one loop. It reads from top to bottom: `Loop.run` tells the story, each chapter is a function below it.

Everything a step depends on is a number: which rows (seed, epoch, step), which dropout (seed, step, micro-batch), which
learning rate (step). So a checkpoint holds tensors and numbers, and a resumed run takes the same steps to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier import kernels
from luthier.core import Diverged, Interrupted, ResourceError, key
from luthier.runs import Checkpoint, RunFolder, load_newest, prune, save_checkpoint
from luthier.surgery import Tuned
from luthier.training import metrics
from luthier.training.batches import Batch, Batches
from luthier.training.guard import FIRST_STEPS, NoOpGuard, NumberGuard
from luthier.training.objective import Objective, Result
from luthier.training.optimiser import Optimiser
from luthier.training.precision import Precision
from luthier.training.schedule import factor
from luthier.training.signals import StopSignals
from luthier.training.spec import RunSpec

__all__ = ["Listener", "Loop", "out_of_memory"]


class Listener:
    """Hears what happens in a run; the command line draws it. Every method may be left as it is."""

    def say(self, line: str) -> None:
        """One line of facts."""

    def start(self, total: int, done: int) -> None:
        """Training begins at step `done` of `total`."""

    def step(self, step: int, row: dict[str, Any], tokens: int, rows: int) -> None:
        """An optimiser step has been made."""

    def scores(self, step: int, scores: dict[str, float]) -> None:
        """Held-out rows have been scored."""

    def end(self) -> None:
        """Training has ended."""


@dataclass
class Loop:
    """Trains `tuned` on `batches`.

    Args:
        run: where checkpoints and the log go; its lock is held.
        evaluate: scores the held-out rows; called every `eval_every` steps (0: never inside the loop).
        place: names a row of the training table, for messages.
        identity: plain facts stored with each checkpoint.
    """

    spec: RunSpec
    tuned: Tuned
    objective: Objective
    batches: Batches
    optimiser: Optimiser
    precision: Precision
    device: torch.device
    total: int
    run: RunFolder
    evaluate: Callable[[], dict[str, float]]
    eval_every: int
    metric: str
    higher_is_better: bool
    place: Callable[[int], str]
    identity: dict[str, Any]
    trunk_dropout: bool
    listener: Listener = field(default_factory=Listener)

    step: int = 0  # optimiser steps done, skipped ones included
    budget: int = 0  # padded tokens of a micro-batch; halved when memory runs out
    best: dict[str, Any] = field(default_factory=dict)
    waited: int = 0  # evaluations without a better score
    skipped_rows: set[int] = field(default_factory=set)
    numbers: NumberGuard = field(default_factory=NumberGuard)
    seconds: float = 0.0
    rows_seen: int = 0
    tokens_seen: int = 0

    def run_to(self, until: int | None = None) -> None:
        """Train to the last step, or to `until`.

        Raises:
            Interrupted: a signal came; a checkpoint of the last whole step is on the disk.
            Diverged: numbers stayed bad after a roll-back.
            NothingTrains: the first steps changed nothing.
            ResourceError: one row alone does not fit in memory.
        """
        stop = self.total if until is None else min(until, self.total)
        self.budget = self.budget or self.spec.batch.tokens
        guard = NoOpGuard(self.tuned) if self.step < FIRST_STEPS else None
        with StopSignals() as signals:
            if self.step == 0:
                self._try_longest()
                self.save()
            self.listener.start(self.total, self.step)
            saved = begun = time.monotonic()
            while self.step < stop:
                for step, micro_batches in self._ahead(stop):
                    row = self._train_step(step, micro_batches, guard, signals)
                    if row is None:
                        break  # rolled back: fetch batches from the step gone back to
                    self.step = step + 1
                    self.run.event("step", lasting=False, **row)
                    if guard is not None and (self.step == min(FIRST_STEPS, self.total)):
                        guard.check()
                        guard = None
                    self._evaluate_when_due()
                    if self._stopped_early():
                        stop = self.step
                        break
                    if signals.asked is not None:
                        self._leave(signals.asked, begun)
                    if self._checkpoint_is_due(saved):
                        self.save()
                        saved = time.monotonic()
            self.seconds += time.monotonic() - begun
            if self.step > 0:
                self.save()
        self.listener.end()

    # ------------------------------------------------------------------ one step

    def _train_step(
        self, step: int, micro_batches: list[Batch], guard: NoOpGuard | None, signals: StopSignals
    ) -> dict[str, Any] | None:
        """Gradients of all micro-batches, judged, clipped, applied. The row for the log; None after a roll-back."""
        method = self.tuned
        self._mode(training=True)
        while True:
            try:
                losses = self._gradients(step, micro_batches, signals)
                norm = self._ready_gradients(step, guard)
                wrong = self.numbers.judge(sum(losses), norm)
                rate = factor(self.spec.optim.schedule, step + 1, self.total, self.spec.optim.warmup)
                if wrong is None:
                    self.optimiser.clip(norm)
                    self.optimiser.step(rate)
                break
            except Exception as error:
                if not out_of_memory(error):
                    raise
                # Weights have not moved: the step is begun again, in smaller pieces of the same rows.
                self.optimiser.zero_grad()
                micro_batches = self._halve(step, micro_batches, error)
        if wrong is None:
            method.constrain()
            for tuning in method.tunings.values():
                for part in tuning.method.parts():
                    part.on_step(method, step + 1, self.total)
        self.optimiser.zero_grad()
        if wrong is not None:
            return self._bad_step(step, wrong, losses, norm, micro_batches)
        tokens, rows = sum(b.n_tokens for b in micro_batches), sum(len(b.rows) for b in micro_batches)
        self.tokens_seen += tokens
        self.rows_seen += rows
        row = {
            "step": step + 1,
            "loss": round(sum(losses), 6),
            "norm": round(norm, 6),
            "lr": self.optimiser.lr * rate,
            "tokens": tokens,
        }
        self.listener.step(step + 1, row, tokens, rows)
        return row

    def _gradients(self, step: int, micro_batches: list[Batch], signals: StopSignals | None) -> list[float]:
        """Backward through every micro-batch; each loss is its sum over targets by the step's targets."""
        n_targets = max(1, sum(b.n_targets for b in micro_batches))
        losses: list[Tensor] = []
        for micro, batch in enumerate(micro_batches):
            if signals is not None and signals.asked is not None:
                # Half a step is no state: its gradients are dropped, and a resumed run makes the whole step.
                self.optimiser.zero_grad()
                self._leave(signals.asked, time.monotonic())
            loss = self._loss(step, micro, batch) / n_targets
            torch.autograd.backward(loss)
            losses.append(loss.detach())
        for tuning in self.tuned.tunings.values():
            for part in tuning.method.parts():
                extra = part.extra_loss(self.tuned)
                if extra is not None:
                    torch.autograd.backward(extra)
        return torch.stack(losses).float().tolist()

    def _loss(self, step: int, micro: int, batch: Batch) -> Tensor:
        torch.manual_seed(key(self.spec.seed, "step", step, micro))
        batch = batch.to(self.device)
        with self.precision.autocast(self.device), nullcontext() if self.spec.fast else kernels.plain():

            def forward() -> Result:
                return self.objective(batch)

            result = forward
            for tuning in self.tuned.tunings.values():
                for part in tuning.method.parts():
                    result = _wrapped(part, self.tuned, result)
            out = result()
        return out if isinstance(out, Tensor) else out.loss

    def _ready_gradients(self, step: int, guard: NoOpGuard | None) -> float:
        if guard is not None:
            guard.after_backward()
        for tuning in self.tuned.tunings.values():
            for part in tuning.method.parts():
                part.after_backward(self.tuned, step + 1, self.total)
        self.tuned.mask_gradients()
        return self.optimiser.norm()

    def _mode(self, *, training: bool) -> None:
        """Training mode for what is attached; for the trunk only where its dropout is wanted."""
        model = self.tuned.model
        if model.luthier.training == training and model.training == (training and self.trunk_dropout):
            return
        model.train(training and self.trunk_dropout)
        model.luthier.train(training)
        if training and self.spec.gradient_checkpointing:
            # transformers checkpoints only layers that call themselves training; their dropout modules need not.
            for module in model.modules():
                if hasattr(module, "gradient_checkpointing"):
                    module.training = True

    # ------------------------------------------------------------------ when numbers go wrong

    def _bad_step(
        self, step: int, wrong: str, losses: list[float], norm: float, micro_batches: list[Batch]
    ) -> dict[str, Any] | None:
        """No update; the rows are named. Three in a row: back to the last good checkpoint, without those rows."""
        guilty = [b for b, loss in zip(micro_batches, losses, strict=True) if not np.isfinite(loss)] or micro_batches
        rows = sorted({int(self.batches.examples.rows[i]) for b in guilty for i in b.rows})
        places = [self.place(r) for r in rows]
        self.run.event("no_update", step=step + 1, reason=wrong, rows=places[:64], n_rows=len(places))
        self.listener.say(f"step {step + 1}: {wrong}, no update; rows {', '.join(places[:5])}")
        self._suspects = [
            *getattr(self, "_suspects", [])[-64 * self.numbers.patience :],
            *[int(i) for b in guilty for i in b.rows],
        ]
        if self.numbers.in_a_row < self.numbers.patience:
            return {"step": step + 1, "loss": None, "norm": None, "lr": 0.0, "tokens": 0, "skipped": wrong}
        if self.numbers.rollbacks >= 1:
            self.run.event("diverged", step=step + 1, reason=wrong)
            raise Diverged(
                f"step {step + 1}: {wrong}, {self.numbers.patience} times in a row and again after going back. "
                "Stopped; the last good checkpoint stays. Lower the learning rate, or look at the rows in events.jsonl."
            )
        self._roll_back(step, wrong)
        return None

    def _roll_back(self, step: int, wrong: str) -> None:
        rollbacks, suspects = self.numbers.rollbacks + 1, set(self._suspects)
        checkpoint, _ = load_newest(self.run)
        assert checkpoint is not None, "step 0 is always saved"
        self.load(checkpoint)
        self.numbers.rollbacks, self.numbers.in_a_row = rollbacks, 0
        self.skipped_rows |= suspects
        self._suspects = []
        self.run.event("rolled_back", from_step=step + 1, to_step=self.step, reason=wrong, rows_left_out=len(suspects))
        self.listener.say(f"{wrong}: back to step {self.step}, without {len(suspects)} rows")

    def _halve(self, step: int, micro_batches: list[Batch], error: BaseException) -> list[Batch]:
        widest = max(b.inputs["input_ids"].numel() for b in micro_batches)
        if all(len(b.rows) == 1 for b in micro_batches):
            raise ResourceError(
                f"step {step + 1}: one row of {widest} tokens alone does not fit in memory ({error}). "
                "Lower max_length, set gradient_checkpointing = true, or take a smaller model."
            ) from error
        self.budget = max(1, widest // 2)
        self.run.event("out_of_memory", step=step + 1, tokens=widest, new_budget=self.budget)
        self.listener.say(
            f"out of memory at {widest} tokens: micro-batches now hold {self.budget}; the step keeps its rows"
        )
        return self._cut(step)

    # ------------------------------------------------------------------ batches

    def _ahead(self, stop: int) -> Any:
        """(step, micro-batches) from here to `stop`, prepared ahead unless the cut has changed."""
        if self.budget == self.spec.batch.tokens and not self.skipped_rows:
            for step, micro_batches in self.batches.from_step(self.step, stop):
                if self.budget != self.spec.batch.tokens:
                    micro_batches = self._cut(step)
                yield step, micro_batches
        else:
            for step in range(self.step, stop):
                yield step, self._cut(step)

    def _cut(self, step: int) -> list[Batch]:
        epoch, inside = self.batches.order.at(step)
        kept = []
        for piece in self.batches.pieces(epoch, inside, self.budget):
            left = np.asarray([i for i in piece if int(i) not in self.skipped_rows], dtype=np.int64)
            if len(left):
                kept.append(self.batches.collator(self.batches.examples, left))
        return kept or [
            self.batches.collator(self.batches.examples, self.batches.pieces(epoch, inside, self.budget)[0])
        ]

    def _try_longest(self) -> None:
        """The widest micro-batch first: memory runs out before step 1 or not at all."""
        self._mode(training=True)
        longest = self.batches.longest()
        while True:
            try:
                self._gradients(0, [longest], None)
                self.optimiser.zero_grad()
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self.optimiser.zero_grad()
                if len(longest.rows) == 1:
                    self._halve(0, [longest], error)
                half = longest.rows[: len(longest.rows) // 2]
                self.budget = int(longest.inputs["input_ids"].shape[1]) * len(half)
                self.run.event(
                    "out_of_memory", step=0, tokens=longest.inputs["input_ids"].numel(), new_budget=self.budget
                )
                longest = self.batches.collator(self.batches.examples, half)

    # ------------------------------------------------------------------ evaluation

    def _evaluate_when_due(self) -> None:
        if not self.eval_every or self.step % self.eval_every or self.step == self.total:
            return
        self._mode(training=False)
        scores = self.evaluate()
        self.run.event("scores", lasting=False, step=self.step, **{k: round(v, 6) for k, v in scores.items()})
        self.listener.scores(self.step, scores)
        value = scores[self.metric]
        if metrics.better(self.metric, value, self.best.get("value")):
            self.best, self.waited = {"step": self.step, "value": value}, 0
            if self.spec.eval.best:
                self.save()
        else:
            self.waited += 1

    def _stopped_early(self) -> bool:
        patience = self.spec.eval.patience
        if patience is None or self.waited < patience:
            return False
        self.run.event("stopped_early", step=self.step, best=self.best)
        self.listener.say(f"no better {self.metric} in {self.waited} evaluations: stopped at step {self.step}")
        return True

    # ------------------------------------------------------------------ state

    def _checkpoint_is_due(self, saved: float) -> bool:
        every = self.spec.checkpoint
        by_steps = every.every_steps is not None and self.step % every.every_steps == 0
        return by_steps or (every.every_seconds > 0 and time.monotonic() - saved > every.every_seconds)

    def state(self) -> dict[str, Any]:
        """Everything besides tensors that the next step depends on."""
        return {
            "step": self.step,
            "budget": self.budget,
            "best": self.best,
            "waited": self.waited,
            "skipped_rows": sorted(self.skipped_rows),
            "suspects": getattr(self, "_suspects", []),
            "numbers": self.numbers.state(),
            "rows_seen": self.rows_seen,
            "tokens_seen": self.tokens_seen,
            "updates": self.optimiser.updates,
            "finished": {n: t.finished for n, t in self.tuned.tunings.items()},
            **self.identity,
        }

    def save(self) -> None:
        """Make the state of the last whole step safe, then prune."""
        tensors = {"adapter": self.tuned.state_tensors(), "optimizer": self.optimiser.tensors()}
        best = self.best.get("step") if self.spec.eval.best else None
        save_checkpoint(self.run, self.step, tensors, self.state(), keep_best=best)
        prune(self.run, keep_last=self.spec.checkpoint.keep, keep_best=best, powers_of_two=False)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a verified checkpoint's state, and let the log end where it ended then."""
        self.tuned.load_state_tensors(checkpoint.tensors["adapter"])
        self.optimiser.load(checkpoint.tensors["optimizer"])
        state = checkpoint.state
        self.step, self.budget = int(state["step"]), int(state["budget"])
        self.best, self.waited = dict(state["best"]), int(state["waited"])
        self.skipped_rows = set(state["skipped_rows"])
        self._suspects = list(state["suspects"])
        self.numbers.load(state["numbers"])
        self.rows_seen, self.tokens_seen = int(state["rows_seen"]), int(state["tokens_seen"])
        self.optimiser.updates = int(state["updates"])
        self.run.truncate_events(checkpoint.event_rows)

    def _leave(self, signum: int, begun: float) -> None:
        self.save()
        self.seconds += time.monotonic() - begun
        self.run.event("interrupted", step=self.step, signal=signum, seconds=round(self.seconds, 3))
        self.listener.end()
        raise Interrupted(
            f"stopped by signal {signum} after step {self.step} of {self.total}; nothing is lost. "
            f"Go on with `luthier resume {self.run.path}`.",
            signum,
        )


def _wrapped(part: Any, tuned: Tuned, inner: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: part.loss(tuned, inner)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, in any of the ways it is said."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(
        words in text
        for words in ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator")
    )

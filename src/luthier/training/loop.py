"""The one loop. It reads from top to bottom: `Loop.run_to` tells the story, each chapter is a function below it.

Everything a step depends on is a number: which rows (seed, epoch, step), which dropout (seed, step, micro-batch), which
learning rate (step). So a checkpoint holds tensors and numbers, and a resumed run takes the same steps to the bit.

A step is made in two halves. Until the gradient is whole nothing has moved, and the half can be begun again as often as
it takes (memory, signals). The update is made once; where it fails midway the run goes back to its last checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luthier.core import Diverged, Interrupted, ResourceError, WrongArithmetic, key
from luthier.data.batches import Batch, Batches, ahead
from luthier.runs import Checkpoint, RunFolder, load_newest, prune, save_checkpoint
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, Tuned
from luthier.training.early_stopping import Selection
from luthier.training.evaluate import Evaluator, plain_scores
from luthier.training.guards import LossScale, NoOpGuard, NumberGuard
from luthier.training.memory_parts import Parts, make_room, out_of_memory
from luthier.training.objective import Objective, Result
from luthier.training.optimiser import Lomo, NotFinite, Optimiser
from luthier.training.precision import Precision
from luthier.training.recheck import differing
from luthier.training.schedule import factor
from luthier.training.stop_signals import Asked, StopSignals

__all__ = ["Listener", "Loop"]


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
        evaluator: scores held-out rows, `eval_every` steps apart (None or 0: never inside the loop).
        selection: what follows from those scores.
        place: names a row of the training table, for messages.
        identity: plain facts stored with each checkpoint.
        signals: asked at every safe place.
    """

    spec: RunSpec
    tuned: Tuned
    objective: Objective
    batches: Batches
    optimiser: Optimiser
    precision: Precision
    device: torch.device
    run: RunFolder
    evaluator: Evaluator | None
    eval_every: int
    selection: Selection
    place: Callable[[int], str]
    identity: dict[str, Any]
    trunk_dropout: bool
    signals: StopSignals = field(default_factory=StopSignals)
    listener: Listener = field(default_factory=Listener)
    program_bytes: int = 0

    step: int = 0  # optimiser steps done, skipped ones included
    origin: tuple[int, int] = (0, 0)  # an epoch, and the step it began at; moves where the batch size changes
    budget: int = 0  # padded tokens of a micro-batch; halved when memory runs out
    left_out: set[int] = field(default_factory=set)  # examples that a roll-back left out
    numbers: NumberGuard = field(default_factory=NumberGuard)
    seconds: float = 0.0
    rows_seen: int = 0
    tokens_seen: int = 0
    failed_update: int | None = None  # the step whose update ran out of memory
    bad_gradients: set[int] = field(default_factory=set)  # steps whose gradient turned out bad inside their update
    memory: dict[str, int] = field(default_factory=dict)  # bytes by part, from the trial before step 1

    def __post_init__(self) -> None:
        self.budget = self.budget or self.spec.batch.tokens
        self.guard: NoOpGuard | None = None
        self.scale = LossScale(self.precision.name == "fp16")
        self.parts: list[Method] = [p for t in self.tuned.tunings.values() for p in t.method.parts()]
        self._saved: dict[str, Any] = {}  # the state at the last save
        self._parts: Parts | None = None  # counts what the trial's forward pass keeps
        self._graph: Tensor | None = None  # a loss whose backward pass will be the update
        self.checkpointing = self.spec.gradient_checkpointing is True
        self._listens = any(type(p).after_backward is not Method.after_backward for p in self.parts)

    def run_to(self, until: int | None = None) -> None:
        """Train to the last step, or to `until`.

        Raises:
            Interrupted: a signal came; a checkpoint of the last whole step is on the disk.
            Diverged: numbers stayed bad after a roll-back.
            NothingTrains: the first steps changed nothing.
            ResourceError: one row alone does not fit in memory.
            WrongArithmetic: a gradient that was computed twice came out otherwise (`recheck`).
        """
        stop = self.total if until is None else min(until, self.total)
        saved = begun = time.monotonic()
        try:
            if self.step == 0:
                self._try_longest()
                self.guard = NoOpGuard(self.tuned)
                self.save()
            self.listener.start(self.total, self.step)
            self._evaluate_when_due()  # of a run that was stopped during an evaluation
            while self.step < stop and not self.selection.enough:
                for step, micro_batches in self._ahead(stop):
                    row = self._train_step(step, micro_batches)
                    if row is None:
                        break  # gone back: fetch batches from the step gone back to
                    self.step = step + 1
                    self.run.event("step", lasting=False, **row)
                    self._guard_first_steps()
                    self._evaluate_when_due()
                    self.signals.check()
                    if self._checkpoint_is_due(saved):
                        self.save()
                        saved = time.monotonic()
                    if self.selection.enough:
                        break
            if self.selection.enough and self.step < self.total:
                self.run.event("stopped_early", step=self.step, best_step=self.selection.best_step)
                self.listener.say(
                    f"no better {self.selection.metric} in {self.selection.waited} evaluations: stopped at step "
                    f"{self.step}"
                )
            self.save()
            self.seconds += time.monotonic() - begun
        except Asked as asked:
            self.seconds += time.monotonic() - begun
            self._leave(asked.number)
        finally:
            self.listener.end()

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        epoch, step = self.origin
        if self.spec.steps is not None or step == 0:
            return self.spec.total_steps(self.batches.order.steps_per_epoch)
        whole = self.spec.total_steps(1) if self.spec.epochs is None else self.spec.epochs
        return step + max(0, round((whole - epoch) * self.batches.order.steps_per_epoch))

    # ------------------------------------------------------------------ one step

    def _train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, Any] | None:
        """Gradients of all micro-batches, judged, clipped, applied. The row for the log; None after going back."""
        self._mode(training=True)
        losses, norm, micro_batches = self._whole_gradient(step, micro_batches)
        if not micro_batches:
            return _row(step, skipped="all its rows are left out")
        if not self.scale.fits(sum(losses), norm):
            self._forget()
            return _row(step, skipped=f"fp16 overflow, loss scale now {self.scale.value:g}")
        wrong = self.numbers.judge(sum(losses), math.nan if step in self.bad_gradients else norm)
        if wrong is not None:
            self._forget()
            return self._bad_step(step, wrong, losses, micro_batches)
        rate = factor(self.spec.optim.schedule, step + 1, self.total, self.spec.optim.warmup)
        try:
            norm = self._update(step, norm, rate, micro_batches)
        except NotFinite as error:
            self._gradient_failed(step, error)
            return None
        except Exception as error:
            if not out_of_memory(error):
                raise
            self._update_failed(step, error)
            return None
        finally:
            self._forget()
        tokens, rows = sum(b.n_tokens for b in micro_batches), sum(len(b.rows) for b in micro_batches)
        self.tokens_seen += tokens
        self.rows_seen += rows
        row = _row(step, loss=round(sum(losses), 6), norm=round(norm, 6), lr=self.optimiser.lr * rate, tokens=tokens)
        self.listener.step(step + 1, row, tokens, rows)
        return row

    def _whole_gradient(self, step: int, micro_batches: list[Batch]) -> tuple[list[float], float, list[Batch]]:
        """The losses of all micro-batches, the norm of the step's gradient, and the micro-batches as they were cut.

        Nothing has moved before this returns, so a step that does not fit is begun again in smaller pieces of the
        same rows.
        """
        while micro_batches:
            try:
                losses = self._first_pass(step, micro_batches)
                self._count()
                self._recheck(step, micro_batches, losses)
                return losses, self._gradient_norm(step), micro_batches
            except Asked:
                self._forget()  # half a step is no state: a resumed run makes the whole of it
                raise
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._forget()
                self._make_do(step + 1, micro_batches, error)
                if self._parts is not None:
                    self._parts = Parts(self.tuned, self.optimiser, self.device)
            make_room()
            micro_batches = self._cut(step)
        return [], 0.0, []

    def _first_pass(self, step: int, micro_batches: list[Batch]) -> list[float]:
        """All that can be known of a step's gradient before anything moves; the losses."""
        if not isinstance(self.optimiser, Lomo):
            return self._gradients(step, micro_batches)
        if self.optimiser.in_one_pass:
            self.signals.check()
            self._graph = self._loss(step, 0, micro_batches[0]) / max(1, micro_batches[0].n_targets)
            return [float(self._graph.detach().float())]
        with self.optimiser.measuring():
            return self._gradients(step, micro_batches)

    def _gradients(self, step: int, micro_batches: list[Batch]) -> list[float]:
        """Backward through every micro-batch; each loss is its sum over targets by the step's targets."""
        n_targets = max(1, sum(b.n_targets for b in micro_batches))
        losses: list[Tensor] = []
        for micro, batch in enumerate(micro_batches):
            self.signals.check()
            with self._parts.watching() if self._parts is not None else nullcontext():
                loss = self._loss(step, micro, batch) / n_targets
            with self.objective.cut():
                torch.autograd.backward(loss * self.scale.value if self.scale.on else loss)
            losses.append(loss.detach())
        grads = [p.grad for p in self.optimiser.named.values() if p.grad is not None] if self.scale.on else []
        if grads:
            torch._foreach_mul_(grads, 1 / self.scale.value)
        for part in self.parts:
            extra = part.extra_loss(self.tuned)
            if extra is not None:
                torch.autograd.backward(extra)
        return torch.stack(losses).float().tolist()

    def _recheck(self, step: int, micro_batches: list[Batch], losses: list[float]) -> None:
        """Where the spec asks for it: the same gradient once more, to the bit, or this machine is not to be trusted."""
        every = self.spec.recheck
        if not every or (step + 1) % every:
            return
        found = differing(losses, self.optimiser.named, lambda: self._gradients(step, micro_batches))
        if found:
            self.run.event("wrong_arithmetic", step=step + 1, n_differ=len(found), differ=found[:64])
            raise WrongArithmetic(
                f"step {step + 1}: computed twice, {len(found)} results differ ({', '.join(found[:3])}). No update was "
                "made; the last good checkpoint stays. On a CPU this is faulty hardware: resume on another machine. On "
                "a GPU it may be a kernel that adds in no fixed order: then leave recheck at 0."
            )

    def _loss(self, step: int, micro: int, batch: Batch) -> Tensor:
        _seed(key(self.spec.seed, "step", step, micro), self.device)
        batch = batch.to(self.device)
        with self.precision.autocast(self.device):

            def forward() -> Result:
                return self.objective(batch)

            result = forward
            for part in self.parts:
                result = _wrapped(part, self.tuned, result)
            out = result()
        return out if isinstance(out, Tensor) else out.loss

    def _gradient_norm(self, step: int) -> float:
        """What is not finite is stopped here, before a method that keeps statistics of gradients has seen it."""
        norm = self.optimiser.norm()
        if not math.isfinite(norm):
            return norm
        if self.guard is not None:
            self.guard.after_backward(self.optimiser.has_gradient)
        for part in self.parts:
            part.after_backward(self.tuned, step + 1, self.total)
        self.tuned.mask_gradients()
        return self.optimiser.norm() if self._changes_gradients else norm

    @property
    def _changes_gradients(self) -> bool:
        """Whether a method or an update mask may have changed a gradient since backward."""
        masks = (u.mask for t in self.tuned.tunings.values() for u in t.unfrozen.values())
        return self._listens or any(m is not None for m in masks)

    def _update(self, step: int, norm: float, rate: float, micro_batches: list[Batch]) -> float:
        """Move what trains; the norm of the gradient, which may be known only now."""
        if isinstance(self.optimiser, Lomo):
            norm = self._backward_moves(self.optimiser, step, norm, rate, micro_batches[0])
        else:
            self.optimiser.clip(norm)
            self.optimiser.step(rate)
        self.tuned.constrain()
        for part in self.parts:
            part.on_step(self.tuned, step + 1, self.total)
        if self.guard is not None:
            self.guard.after_update()
        return norm

    def _backward_moves(self, optimiser: Lomo, step: int, norm: float, rate: float, batch: Batch) -> float:
        """The backward pass that is the update. Signals wait: half of it is no state."""
        loss, self._graph = self._graph, None
        if loss is None:  # the same rows, the same dropout, the same gradient as when its norm was taken
            loss = self._loss(step, 0, batch) / max(1, batch.n_targets)
        with optimiser.applying(rate, norm), self.objective.cut():
            torch.autograd.backward(loss)
        if self.guard is not None:
            self.guard.after_backward(optimiser.has_gradient)
        return optimiser.norm()

    def _forget(self) -> None:
        """Let go of the step's gradients and graph."""
        self._graph = None
        self.optimiser.zero_grad()

    def _guard_first_steps(self) -> None:
        if self.guard is not None and (self.guard.due or self.step == self.total):
            self.guard.check()
            self.guard = None

    def _mode(self, *, training: bool) -> None:
        """Training mode for what is attached; for the trunk only where its dropout is wanted."""
        model = self.tuned.model
        if model.luthier.training == training and model.training == (training and self.trunk_dropout):
            return
        model.train(training and self.trunk_dropout)
        model.luthier.train(training)
        if training and self.checkpointing:
            self._let_blocks_checkpoint()

    def _let_blocks_checkpoint(self) -> None:
        # transformers checkpoints only layers that call themselves training; their dropout modules need not.
        for module in self.tuned.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.training = True

    # ------------------------------------------------------------------ when numbers go wrong

    def _bad_step(
        self, step: int, wrong: str, losses: list[float], micro_batches: list[Batch]
    ) -> dict[str, Any] | None:
        """No update; the rows are named. Three in a row: back to the last good checkpoint, without those rows."""
        guilty = [b for b, loss in zip(micro_batches, losses, strict=True) if not np.isfinite(loss)] or micro_batches
        rows = sorted({int(self.batches.examples.rows[i]) for b in guilty for i in b.rows})
        places = [self.place(r) for r in rows]
        self.run.event("no_update", step=step + 1, reason=wrong, rows=places[:64], n_rows=len(places))
        self.listener.say(f"step {step + 1}: {wrong}, no update; rows {', '.join(places[:5])}")
        self.numbers.suspect(i for b in guilty for i in b.rows)
        if self.numbers.in_a_row < self.numbers.patience:
            return _row(step, skipped=wrong)
        if self.numbers.rollbacks >= 1:
            self.run.event("diverged", step=step + 1, reason=wrong)
            raise Diverged(
                f"step {step + 1}: {wrong}, {self.numbers.patience} times in a row and again after going back. "
                "Stopped; the last good checkpoint stays. Lower the learning rate, or look at the rows in events.jsonl."
            )
        left_out, suspects, rollbacks = self.left_out, set(self.numbers.suspects), self.numbers.rollbacks + 1
        self._go_back()
        self.bad_gradients.clear()  # without those rows the steps to come are others
        self.numbers.went_back(rollbacks)
        self.left_out = left_out | suspects
        self.run.event("rolled_back", from_step=step + 1, to_step=self.step, reason=wrong, rows_left_out=len(suspects))
        self.listener.say(f"{wrong}: back to step {self.step}, without {len(suspects)} rows")
        self.save()  # whoever has to come back here once more must know of it
        return None

    def _gradient_failed(self, step: int, error: NotFinite) -> None:
        """Found when other tensors had moved: go back to where nothing had, and make no update of this step then."""
        self.bad_gradients.add(step)
        self._go_back()
        self.run.event("went_back", step=step + 1, to_step=self.step, reason=f"non-finite gradient of {error}")
        self.listener.say(
            f"step {step + 1}: non-finite gradient of {error} inside the update: back to step {self.step}, and on "
            "without an update there"
        )

    def _go_back(self) -> None:
        checkpoint, _ = load_newest(self.run)
        assert checkpoint is not None, "step 0 is always saved"
        self.load(checkpoint)

    # ------------------------------------------------------------------ when memory runs out

    def _make_do(self, step: int, micro_batches: list[Batch], error: BaseException) -> None:
        """Less memory at the price of time: first what leaves every bit as it is, then smaller pieces."""
        if not self._can_checkpoint():
            self._halve(step, micro_batches, error)
            return
        widest = max(b.inputs["input_ids"].numel() for b in micro_batches)
        self._checkpoint_activations()
        self.run.event("out_of_memory", step=step, tokens=widest, gradient_checkpointing=True)
        self.listener.say(
            f"out of memory at {widest} tokens: activations are computed twice from here on (gradient checkpointing); "
            "that takes time and changes no number"
        )

    def _can_checkpoint(self) -> bool:
        wanted = self.spec.gradient_checkpointing == "auto" and not self.checkpointing
        return wanted and bool(getattr(self.tuned.model, "supports_gradient_checkpointing", False))

    def _checkpoint_activations(self) -> None:
        self.checkpointing = True
        self.tuned.checkpoint_activations()
        self._let_blocks_checkpoint()

    def _halve(self, step: int, micro_batches: list[Batch], error: BaseException) -> None:
        widest = max(b.inputs["input_ids"].numel() for b in micro_batches)
        if isinstance(self.optimiser, Lomo):
            raise ResourceError(
                f"step {step}: {len(micro_batches[0].rows)} rows of {widest} tokens together do not fit in memory "
                f"({error}), and optim.name = lomo makes a step in one piece. Lower batch.size or max_length, or set "
                "gradient_checkpointing = true; the last good checkpoint, if there is one, stays."
            ) from error
        if all(len(b.rows) == 1 for b in micro_batches):
            raise ResourceError(
                f"step {step}: one row of {widest} tokens alone does not fit in memory ({error}). "
                "Lower max_length, set gradient_checkpointing = true, or take a smaller model."
            ) from error
        self.budget = max(1, min(self.budget, widest) // 2)
        self.run.event("out_of_memory", step=step, tokens=widest, new_budget=self.budget)
        self.listener.say(
            f"out of memory at {widest} tokens: micro-batches now hold {self.budget}; the step keeps its rows"
        )

    def _update_failed(self, step: int, error: BaseException) -> None:
        """Some numbers may have moved and some not: only a checkpoint is a state to go on from."""
        if self.failed_update == step:
            raise ResourceError(
                f"step {step + 1}: the update itself does not fit in memory ({error}). Train fewer numbers (another "
                "method, a smaller rank), or take a smaller model; the last good checkpoint stays."
            ) from error
        self.failed_update = step
        in_backward = isinstance(self.optimiser, Lomo)
        budget = self.budget if in_backward else max(1, self.budget // 2)
        self._go_back()
        self.budget = min(self.budget, budget)
        if in_backward and self._can_checkpoint():
            self._checkpoint_activations()
        make_room()
        self.run.event(
            "out_of_memory", step=step + 1, where="update", to_step=self.step, new_budget=self.budget,
            gradient_checkpointing=self.checkpointing,
        )  # fmt: skip
        lighter = "activations are computed twice" if self.checkpointing else "the same is tried again"
        self.listener.say(
            f"out of memory in the update of step {step + 1}: back to step {self.step}, "
            + (lighter if in_backward else f"micro-batches now hold {self.budget} tokens")
        )

    def _try_longest(self) -> None:
        """The widest batches first, for evaluation and training: memory runs out before step 1 or not at all.

        Where step 1 is as wide itself, as with rows of one length, it is the trial: another would take as long.
        """
        if self.evaluator is not None:
            self._mode(training=False)
            self.evaluator.try_longest()
        self._mode(training=True)
        longest = self.batches.longest()
        first = self._cut(0)
        if len(first) == 1 and _as_wide(first[0], longest) and not isinstance(self.optimiser, Lomo):
            self._parts = Parts(self.tuned, self.optimiser, self.device)
            return
        while True:
            try:
                self._try(longest)
                return
            except Exception as error:
                if not out_of_memory(error):
                    raise
                self._make_do(0, [longest], error)
            finally:
                self.optimiser.zero_grad()
            make_room()
            fits = max(1, self.budget // longest.inputs["input_ids"].shape[1])
            longest = self.batches.collator(self.batches.examples, longest.rows[:fits])

    def _try(self, longest: Batch) -> None:
        """One pass that moves nothing; what it holds is counted."""
        self._parts = Parts(self.tuned, self.optimiser, self.device)
        try:
            with self.optimiser.measuring() if isinstance(self.optimiser, Lomo) else nullcontext():
                self._gradients(0, [longest])
            self._count()
        finally:
            self._parts = None

    def _count(self) -> None:
        """Note what the trial held, while its gradients are there."""
        if self._parts is not None:
            self.memory, self._parts = self._parts.counted(), None

    # ------------------------------------------------------------------ batches

    def _at(self, step: int) -> tuple[int, int]:
        """(epoch, step in it)."""
        epoch, first = self.origin
        epochs, inside = divmod(step - first, self.batches.order.steps_per_epoch)
        return epoch + epochs, inside

    def _ahead(self, stop: int) -> Iterator[tuple[int, list[Batch]]]:
        """(step, micro-batches) from here to `stop`, prepared ahead by the workers."""

        def make(step: int) -> tuple[int, list[Batch]]:
            return self.budget, self._cut(step)

        for step, (budget, micro_batches) in ahead(make, range(self.step, stop), self.batches.workers):
            yield step, micro_batches if budget == self.budget else self._cut(step)

    def _cut(self, step: int) -> list[Batch]:
        """The micro-batches of a step: its rows, less those left out, cut to the budget. May be empty."""
        pieces = self.batches.pieces(*self._at(step), self.budget)
        if self.left_out:
            pieces = [np.asarray([i for i in p if int(i) not in self.left_out], dtype=np.int64) for p in pieces]
        return [self.batches.collator(self.batches.examples, p) for p in pieces if len(p)]

    # ------------------------------------------------------------------ evaluation

    def _evaluate_when_due(self) -> None:
        last = self.spec.eval.selects and self.step == self.total
        due = self.eval_every and self.step and (self.step % self.eval_every == 0 or last)
        if self.evaluator is None or not due or self.selection.at == self.step:
            return
        self._mode(training=False)
        scores = self.evaluator.scores()
        self.run.event("scores", lasting=False, step=self.step, **plain_scores(scores, 6))
        self.listener.scores(self.step, scores)
        if self.selection.hear(self.step, scores) and self.spec.eval.best:
            self.save()

    # ------------------------------------------------------------------ state

    def _checkpoint_is_due(self, saved: float) -> bool:
        every = self.spec.checkpoint
        by_steps = every.every_steps is not None and self.step % every.every_steps == 0
        return by_steps or (every.every_seconds > 0 and time.monotonic() - saved > every.every_seconds)

    def state(self) -> dict[str, Any]:
        """Everything besides tensors that the next step depends on."""
        return {
            "step": self.step,
            "origin": list(self.origin),
            "steps_per_epoch": self.batches.order.steps_per_epoch,
            "tokens": self.spec.batch.tokens,
            "budget": self.budget,
            "checkpointing": self.checkpointing,
            "memory": self.memory,
            "eval_budget": self.evaluator.budget if self.evaluator is not None else None,
            "selection": self.selection.state(),
            "left_out": sorted(self.left_out),
            "numbers": self.numbers.state(),
            "scale": self.scale.state(),
            "guard": self.guard.state() if self.guard is not None else None,
            "rows_seen": self.rows_seen,
            "tokens_seen": self.tokens_seen,
            "updates": self.optimiser.updates,
            **self.identity,
        }

    def save(self) -> None:
        """Make the state of the last whole step safe, then prune. What is safe already is not written again."""
        state = self.state()
        if state == self._saved:
            return
        tensors = {"adapter": self.tuned.state_tensors(), "optimizer": self.optimiser.tensors()}
        best = self.selection.kept
        save_checkpoint(self.run, self.step, tensors, state, keep_best=best)
        self._saved = state
        prune(self.run, keep_last=self.spec.checkpoint.keep, keep_best=best, powers_of_two=False)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a verified checkpoint's state, and let the log end where it ended then."""
        self.tuned.load_state_tensors(checkpoint.tensors["adapter"])
        self.optimiser.load(checkpoint.tensors["optimizer"])
        state = checkpoint.state
        self.step, self.origin = int(state["step"]), (int(state["origin"][0]), int(state["origin"][1]))
        if state["tokens"] == self.spec.batch.tokens:  # else the user has asked for another budget since
            self.budget = int(state["budget"])
            if self.evaluator is not None and state["eval_budget"] is not None:
                self.evaluator.budget = int(state["eval_budget"])
        self.selection.load(state["selection"])
        if state.get("checkpointing") and self._can_checkpoint():
            self._checkpoint_activations()
        self.memory = dict(state.get("memory", {}))
        self.left_out = set(state["left_out"])
        self.numbers.load(state["numbers"])
        self.scale.load(state["scale"])
        self.guard = None
        if state["guard"] is not None:
            self.guard = NoOpGuard(self.tuned)
            self.guard.load(state["guard"])
        self.rows_seen, self.tokens_seen = int(state["rows_seen"]), int(state["tokens_seen"])
        self.optimiser.updates = int(state["updates"])
        self.run.truncate_events(checkpoint.event_rows)
        self._saved = self.state()

    def _leave(self, signum: int) -> None:
        self.save()
        self.run.event("interrupted", step=self.step, signal=signum, seconds=round(self.seconds, 3))
        raise Interrupted(
            f"stopped by signal {signum} after step {self.step} of {self.total}; nothing is lost. "
            f"Go on with `luthier resume {self.run.path}`.",
            signum,
        )


def _as_wide(batch: Batch, longest: Batch) -> bool:
    """Whether a pass over `batch` needs at least the memory of one over `longest`."""
    shapes = {name: x.shape for name, x in batch.inputs.items()}
    return shapes == {name: x.shape for name, x in longest.inputs.items()} and batch.n_targets >= longest.n_targets


def _row(step: int, **found: Any) -> dict[str, Any]:
    """One step's line in the log; a step without an update says why."""
    return {"step": step + 1, "loss": None, "norm": None, "lr": 0.0, "tokens": 0, **found}


def _seed(seed: int, device: torch.device) -> None:
    """Seed what draws here. `torch.manual_seed` notes every call for devices that are never used: 0.7 ms a step."""
    torch.default_generator.manual_seed(seed)
    if device.type in ("cuda", "mps", "xpu"):
        torch.manual_seed(seed)


def _wrapped(part: Any, tuned: Tuned, inner: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: part.loss(tuned, inner)

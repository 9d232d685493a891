"""The one loop. It reads from top to bottom: `Loop.run_to` tells the story, each chapter is a function below it.

Everything a step depends on is a number: which rows (seed, epoch, step), which dropout (seed, step, micro-batch), which
learning rate (step). So a checkpoint holds tensors and numbers, and a resumed run takes the same steps to the bit.

A step is made in two halves. Until the gradient is whole nothing has moved, and the half can be begun again as often as
it takes (memory, signals). The update is made once; where it fails midway the run goes back to its last checkpoint.

What is decided beside the step has files of its own:
    feed            which rows come next
    moments         what the method and the strategies do to a step
    out_of_memory   what is lowered when memory runs out
    bad_steps       what follows from numbers that are not finite, or far from those before
    evaluations     when held-out rows are scored
    save_times      when a checkpoint is due
    trial           what the widest pass holds, counted before step 1
    longest         the widest batches, tried before step 1
    step_clock      how long steps took
    loop_state      what a checkpoint holds besides tensors
"""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luthier.core import Interrupted, WrongArithmetic
from luthier.data.batches import Batch
from luthier.training.evaluate import plain_scores
from luthier.training.guards import NoOpGuard
from luthier.training.listener import Listener
from luthier.training.longest import try_longest
from luthier.training.loop_state import LoopState
from luthier.training.optimiser import Lomo, NotFinite
from luthier.training.out_of_memory import is_out_of_memory, make_room
from luthier.training.pass_seed import seed_pass
from luthier.training.recheck import differing, explained
from luthier.training.save_times import SaveTimes
from luthier.training.stop_signals import StopRequested

__all__ = ["Listener", "Loop"]


@dataclass
class Loop(LoopState):
    """Trains `tuned` on the rows of `feed`. What it is made of stands in `LoopState`."""

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
        begun, save_times = time.monotonic(), SaveTimes(self.spec.checkpoint)
        selection = self.evaluations.selection
        try:
            if self.step == 0:
                self.moments.start()
                try_longest(self, self._gradients, self.set_mode)
                self.guard = NoOpGuard(self.tuned)
                self.save()
            self.listener.start(self.total, self.step)
            self._evaluate_when_due()  # of a run that was stopped during an evaluation
            while self.step < stop and not selection.enough:
                for step, micro_batches in self.feed.ahead(self.step, stop):
                    with self.clock.timing(micro_batches):
                        row = self._train_step(step, micro_batches)
                    if row is None:
                        break  # gone back: fetch batches from the step gone back to
                    self.step = step + 1
                    self.run.event("step", lasting=False, **row)
                    if self.guard is not None and (self.guard.due or self.step == self.total):
                        self.guard.check(must_move=self.optimiser.must_move, idle=self._idle)
                        self.guard = None
                    self._evaluate_when_due()
                    self.signals.check()
                    if save_times.due(self.step):
                        self.save()
                        save_times.saved()
                    if selection.enough:
                        break
            if selection.enough and self.step < self.total:
                self.run.event("stopped_early", step=self.step, best_step=selection.best_step)
                self._say(
                    f"no better {selection.metric} in {selection.waited} evaluations: stopped at step {self.step}"
                )
            self.save()
            self.seconds += time.monotonic() - begun
        except StopRequested as asked:
            self.seconds += time.monotonic() - begun
            self.save()
            self.run.event("interrupted", step=self.step, signal=asked.number, seconds=round(self.seconds, 3))
            raise _interrupted(asked.number, self.step, self.total, self.run.path) from asked
        finally:
            self.listener.end()

    # ------------------------------------------------------------------ one step

    def _train_step(self, step: int, micro_batches: list[Batch]) -> dict[str, Any] | None:
        """Gradients of all micro-batches, judged, clipped, applied. The row for the log; None after going back."""
        self.set_mode(training=True)
        if nothing := self.moments.before_step(step, self.total, self.feed.at(step)[0]):
            self._idle = nothing
            return _row(step, skipped=nothing) | self.moments.numbers()
        losses, norm, micro_batches = self._whole_gradient(step, micro_batches)
        if not micro_batches:
            return _row(step, skipped="all its rows are left out")
        if not self.scale.fits(sum(losses), norm):
            self._forget()
            return _row(step, skipped=f"fp16 overflow, loss scale now {self.scale.value:g}")
        wrong = self.bad_steps.judge(step, sum(losses), norm)
        if wrong is not None:
            self._forget()
            if self.bad_steps.skip(step, wrong, losses, micro_batches):
                return _row(step, skipped=wrong)
            self.bad_steps.leave_out_suspects(step, wrong, self._go_back)
            self.save()  # whoever has to come back here once more must know of it
            return None
        rate = self.moments.rate(step, self.total)
        try:
            norm = self._update(step, norm, rate, micro_batches)
        except NotFinite as error:
            self.bad_steps.update_failed(step, error, self._go_back)
            return None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self.saver.update_failed(step, error, self._go_back)
            return None
        finally:
            self._forget()
        tokens, rows = sum(b.n_tokens for b in micro_batches), sum(len(b.rows) for b in micro_batches)
        self.tokens_seen += tokens
        self.rows_seen += rows
        row = _row(step, loss=round(sum(losses), 6), norm=round(norm, 6), lr=self.optimiser.lr * rate, tokens=tokens)
        row |= self.moments.numbers()
        self.listener.step(step + 1, row, tokens, rows)
        return row

    def _whole_gradient(self, step: int, micro_batches: list[Batch]) -> tuple[list[float], float, list[Batch]]:
        """The losses of all micro-batches, the norm of the step's gradient, and the micro-batches as they were cut.

        Nothing has moved before this returns: a step that does not fit is begun again in smaller pieces of its rows.
        """
        while micro_batches:
            try:
                micro_batches = self.moments.batches(micro_batches)
                losses = self._first_pass(step, micro_batches)
                self.trial.count()
                self._recheck(step, micro_batches, losses)
                return losses, self._gradient_norm(step), micro_batches
            except StopRequested:
                self._forget()  # half a step is no state: a resumed run makes the whole of it
                raise
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._forget()
                self.saver.shrink(step + 1, micro_batches, error)
                self.trial.begin_again()
            make_room()
            micro_batches = self.feed.cut(step)
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
        if (made := self.moments.gradient(micro_batches, partial(self._loss, step))) is not None:
            return made
        n_targets = max(1, sum(b.n_targets for b in micro_batches))
        losses: list[Tensor] = []
        for micro, batch in enumerate(micro_batches):
            self.signals.check()
            # Closed, also where memory runs out: what a pass has changed for its time is put back.
            with closing(
                self.moments.passes(micro, batch, n_targets, partial(self._loss, step, micro, batch))
            ) as parts:
                whole: Tensor | None = None
                while True:
                    with self.trial.watching():
                        loss = next(parts, None)
                    if loss is None:
                        break
                    loss = loss / n_targets
                    with self.objective.cut():
                        torch.autograd.backward(loss * self.scale.value if self.scale.on else loss)
                    whole = loss.detach() if whole is None else whole + loss.detach()
            assert whole is not None, "a micro-batch is one pass at least"
            losses.append(whole)
        grads = [p.grad for p in self.optimiser.named.values() if p.grad is not None] if self.scale.on else []
        if grads:
            torch._foreach_mul_(grads, 1 / self.scale.value)
        for penalty in self.moments.penalties():
            torch.autograd.backward(penalty)
        return torch.stack(losses).float().tolist()

    def _recheck(self, step: int, micro_batches: list[Batch], losses: list[float]) -> None:
        """Where the spec asks for it: the same gradient once more, to the bit, or this machine is not to be trusted."""
        every = self.spec.recheck
        if not every or (step + 1) % every:
            return
        found = differing(losses, self.optimiser.named, lambda: self._gradients(step, micro_batches))
        if found:
            self.run.event("wrong_arithmetic", step=step + 1, n_differ=len(found), differ=found[:64])
            raise WrongArithmetic(explained(step + 1, found))

    def _loss(self, step: int, micro: int, batch: Batch) -> Tensor:
        """One forward pass: the loss as a sum over targets. StopRequested twice, it draws the same dropout."""
        seed_pass(self.spec.seed, step, micro, self.device)
        batch = batch.to(self.device)
        with self.precision.autocast(self.device):
            out = self.moments.loss(partial(self.objective, batch))
        return out if isinstance(out, Tensor) else out.loss

    def _gradient_norm(self, step: int) -> float:
        """What is not finite is stopped here, before a method that keeps statistics of gradients has seen it."""
        norm = self.optimiser.norm()
        if not math.isfinite(norm):
            return norm
        if self.guard is not None:
            self.guard.after_backward(self.optimiser.has_gradient, self.moments.resting)
        self.moments.after_backward(step + 1, self.total)
        self.tuned.state.mask_gradients()
        return self.optimiser.norm() if self.moments.change_gradients else norm

    def _update(self, step: int, norm: float, rate: float, micro_batches: list[Batch]) -> float:
        """Move what trains; the norm of the gradient, which may be known only now."""
        if isinstance(self.optimiser, Lomo):
            norm = self._backward_moves(self.optimiser, step, norm, rate, micro_batches[0])
        else:
            self.optimiser.clip(norm)
            self.optimiser.step(rate)
        self.tuned.state.constrain()
        self.moments.after_step(step + 1, self.total)
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
            self.guard.after_backward(optimiser.has_gradient, self.moments.resting)
        return optimiser.norm()

    def _forget(self) -> None:
        """Let go of the step's gradients and graph."""
        self._graph = None
        self.optimiser.zero_grad()

    def set_mode(self, *, training: bool) -> None:
        """Training mode for what is attached; for the trunk only where its dropout is wanted."""
        model = self.tuned.model
        tuning = training and not self.moments.still
        if model.luthier.training == tuning and model.training == (training and self.trunk_dropout):
            return
        model.train(training and self.trunk_dropout)
        model.luthier.train(tuning)
        if training and self.saver.checkpointing:
            self.saver.let_blocks_checkpoint()

    # ------------------------------------------------------------------ between steps

    def _evaluate_when_due(self) -> None:
        if not self.evaluations.due(self.step, self.total) or not self.moments.settled(self.step, self.total):
            return
        self.set_mode(training=False)
        scores, best = self.evaluations.run(self.step, self.moments.keeping())
        self.run.event("scores", lasting=False, step=self.step, **plain_scores(scores, 6))
        self.listener.scores(self.step, scores)
        if best and self.spec.eval.best:
            self.save()


def _interrupted(signum: int, step: int, total: int, path: Path) -> Interrupted:
    return Interrupted(
        f"stopped by signal {signum} after step {step} of {total}; nothing is lost. "
        f"Go on with `luthier resume {path}`.",
        signum,
    )


def _row(step: int, **found: Any) -> dict[str, Any]:
    """One step's line in the log; a step without an update says why."""
    return {"step": step + 1, "loss": None, "norm": None, "lr": 0.0, "tokens": 0, **found}

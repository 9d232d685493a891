"""What a loop is made of: its parts, how far it has come, and what of both checkpoints hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.runs import Checkpoint, RunFolder, load_newest, prune, save_checkpoint
from luthier.runs.spec import RunSpec
from luthier.surgery import Tuned
from luthier.training.bad_steps import BadSteps
from luthier.training.evaluations import Evaluations
from luthier.training.feed import Feed
from luthier.training.guards import LossScale, NoOpGuard
from luthier.training.listener import Listener
from luthier.training.moments import Moments
from luthier.training.objective import Objective
from luthier.training.optimiser import Optimiser
from luthier.training.out_of_memory import MemorySaver
from luthier.training.precision import Precision
from luthier.training.step_clock import StepClock
from luthier.training.stop_signals import StopSignals
from luthier.training.trial import Trial

__all__ = ["LoopState"]


@dataclass
class LoopState:
    """What a loop is made of, and how far it has come.

    Args:
        run: where checkpoints and the log go; its lock is held.
        evaluations: of held-out rows, inside the run.
        moments: the method's and the strategies' part in a step.
        place: names a row of the training table, for messages.
        identity: plain facts stored with each checkpoint.
        signals: asked at every safe place.
    """

    spec: RunSpec
    tuned: Tuned
    objective: Objective
    feed: Feed
    optimiser: Optimiser
    moments: Moments
    evaluations: Evaluations
    precision: Precision
    device: torch.device
    run: RunFolder
    place: Callable[[int], str]
    identity: dict[str, Any]
    trunk_dropout: bool
    signals: StopSignals = field(default_factory=StopSignals)
    listener: Listener = field(default_factory=Listener)
    program_bytes: int = 0

    step: int = 0  # optimiser steps done, skipped ones included
    seconds: float = 0.0
    rows_seen: int = 0
    tokens_seen: int = 0

    def __post_init__(self) -> None:
        self.guard: NoOpGuard | None = None
        self.scale = LossScale(self.precision.name == "fp16")
        self.bad_steps = BadSteps(self.feed, self.place, self.run.event, self._say)
        self.saver = MemorySaver(
            self.spec, self.tuned, self.feed,
            in_one_piece=self.moments.whole_step, event=self.run.event, say=self._say,
        )  # fmt: skip
        self.trial = Trial(self.tuned, self.optimiser, self.device)
        self.clock = StepClock()
        self._saved: dict[str, Any] = {}  # the state at the last save
        self._idle = ""  # why the last step that made no update had nothing to learn
        self._graph: Tensor | None = None  # a loss whose backward pass will be the update

    @property
    def total(self) -> int:
        """Optimiser steps of the whole run."""
        return self.feed.total

    def _say(self, line: str) -> None:
        self.listener.say(line)

    def state(self) -> dict[str, Any]:
        """Everything besides tensors that the next step depends on."""
        evaluator = self.evaluations.evaluator
        return {
            "step": self.step,
            "origin": list(self.feed.origin),
            "steps_per_epoch": self.feed.batches.order.steps_per_epoch,
            "tokens": self.spec.batch.tokens,
            "budget": self.feed.budget,
            "checkpointing": self.saver.checkpointing,
            "memory": self.trial.memory,
            "eval_budget": evaluator.budget if evaluator is not None else None,
            "selection": self.evaluations.selection.state(),
            "left_out": sorted(self.feed.left_out),
            "numbers": self.bad_steps.guard.state(),
            "scale": self.scale.state(),
            "guard": self.guard.state() if self.guard is not None else None,
            "rows_seen": self.rows_seen,
            "tokens_seen": self.tokens_seen,
            "updates": self.optimiser.updates,
            **self.moments.state(),
            **self.identity,
        }

    def save(self) -> None:
        """Make the state of the last whole step safe, then prune. What is safe already is not written again."""
        state = self.state()
        if state == self._saved:
            return
        tensors = {"adapter": self.tuned.state.tensors(), "optimizer": self.optimiser.tensors()}
        tensors |= self.moments.tensors()
        best = self.evaluations.selection.kept
        save_checkpoint(self.run, self.step, tensors, state, keep_best=best)
        self._saved = state
        prune(self.run, keep_last=self.spec.checkpoint.keep, keep_best=best, powers_of_two=False)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up a verified checkpoint's state, and let the log end where it ended then."""
        self.tuned.state.load_tensors(checkpoint.tensors["adapter"])
        self.optimiser.load(checkpoint.tensors["optimizer"])
        state = checkpoint.state
        self.moments.load(state, checkpoint.tensors)
        self.step, self.feed.origin = int(state["step"]), (int(state["origin"][0]), int(state["origin"][1]))
        if state["tokens"] == self.spec.batch.tokens:  # else the user has asked for another budget since
            self.feed.budget = int(state["budget"])
            if self.evaluations.evaluator is not None and state["eval_budget"] is not None:
                self.evaluations.evaluator.budget = int(state["eval_budget"])
        self.evaluations.selection.load(state["selection"])
        if state.get("checkpointing") and self.saver.can_checkpoint:
            self.saver.checkpoint_activations()
        self.trial.memory = dict(state.get("memory", {}))
        self.feed.left_out = set(state["left_out"])
        self.bad_steps.guard.load(state["numbers"])
        self.scale.load(state["scale"])
        self.guard = None
        if state["guard"] is not None:
            self.guard = NoOpGuard(self.tuned)
            self.guard.load(state["guard"])
        self.rows_seen, self.tokens_seen = int(state["rows_seen"]), int(state["tokens_seen"])
        self.optimiser.updates = int(state["updates"])
        self.run.truncate_events(checkpoint.event_rows)
        self._saved = self.state()

    def _go_back(self) -> int:
        """Take up the last checkpoint; its step."""
        checkpoint, _ = load_newest(self.run)
        assert checkpoint is not None, "step 0 is always saved"
        self.load(checkpoint)
        return self.step

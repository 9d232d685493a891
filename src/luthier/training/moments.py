"""The method's and the strategies' part in a run: who is asked at which moment, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from luthier.core import ConfigError
from luthier.data.batches import Batch
from luthier.data.columns import Columns
from luthier.data.examples import Examples
from luthier.data.sets import TRAIN, Sets
from luthier.data.tasks import Task
from luthier.runs.journal import Journal
from luthier.runs.spec import RunSpec
from luthier.surgery import Batches, Method, Phases, Tuned, keyed
from luthier.training.course import Course, Piece, Progress
from luthier.training.feed import Feed
from luthier.training.objective import Objective
from luthier.training.optimiser import Lomo, Optimiser
from luthier.training.other_models import OtherModel
from luthier.training.precision import Precision
from luthier.training.rows_of_a_step import look_at_rows
from luthier.training.schedule import factor
from luthier.training.strategy import Strategy, fills, neutral
from luthier.training.told import told_of

__all__ = ["Moments"]


class Moments:
    """Asks the parts of the method first, then the strategies in the order in which they were named.

    The loop knows moments, not names. Without strategies it makes the very steps that it makes without this.
    """

    def __init__(
        self,
        spec: RunSpec,
        tuned: Tuned,
        task: Task,
        optimiser: Optimiser,
        device: torch.device,
        strategies: Sequence[Strategy] = (),
        *,
        objective: Objective | None = None,
        sets: Mapping[str, Examples] | None = None,
        models: Mapping[str, Mapping[str, OtherModel]] | None = None,
        rows: Sets | None = None,
        cut_rows: Callable[[NDArray[np.int64], tuple[int, ...]], list[Batch]] | None = None,
        precision: Precision | None = None,
        tokenizer: Any = None,
        say: Callable[[str], None] = lambda line: None,
        feed: Feed | None = None,
        texts: Journal | None = None,
        columns: Columns | None = None,
    ) -> None:
        self._spec, self._tuned, self._optimiser, self._device = spec, tuned, optimiser, device
        self._task = task
        self._parts: list[Method] = [p for t in tuned.tunings.values() for p in t.method.parts()]
        self.phases = Phases(tuned, self._parts)
        self._progress = Progress()
        self._asked: list[tuple[Strategy, Course]] = [
            (
                one,
                Course(
                    name=one.name, tuned=tuned, task=task, optimiser=optimiser, device=device, seed=spec.seed,
                    progress=self._progress, objective=objective, sets=sets or {},
                    models=(models or {}).get(one.name, {}), rows=rows or Sets((TRAIN,), (0, 0)), cut_rows=cut_rows,
                    precision=precision, tokenizer=tokenizer, say=say, feed=feed, texts=texts, columns=columns,
                ),
            )
            for one in strategies
        ]  # fmt: skip
        for one, course in self._filling("numbers"):
            _join(one, course)
        self._piece: Piece | None = None
        self.looks: Batches = ()  # the first epoch, for methods that look at it more than once
        self.still = any(one.still for one in strategies)  # all passes are made without dropout
        self.resting: frozenset[str] = frozenset()  # trained tensors that lie still in this step
        self._looks_back = any(type(p).after_backward is not Method.after_backward for p in self._parts) or any(
            fills(one, "after_backward") for one in strategies
        )

    @property
    def whole_step(self) -> bool:
        """Whether a step may not be cut."""
        return isinstance(self._optimiser, Lomo) or any(one.whole_step for one, _ in self._asked)

    def _filling(self, moment: str) -> Iterator[tuple[Strategy, Course]]:
        return ((one, course) for one, course in self._asked if fills(one, moment))

    # ------------------------------------------------------------------ before a step

    def start(self) -> None:
        """Once, before step 1."""
        for one, course in self._filling("start"):
            one.start(course)

    def before_step(self, step: int, total: int, epoch: int) -> str:
        """Step `step`, from 0, is about to be made; gives why nothing is to be learnt in it, or nothing."""
        self._progress.step, self._progress.total, self._progress.epoch = step + 1, total, epoch
        self._progress.numbers.clear()
        for _, course in self._asked:
            course.aside.clear()
        if self.phases:
            with keyed(self._spec.seed, "phase", step):
                entered = self.phases.enter(step + 1, total)
            if entered is not None and entered.fresh:
                self._optimiser.begin_anew()
        for part in self._parts:
            every = getattr(part, part.looks_again, 0)
            if every and step and step % every == 0:
                part.prepare(self._tuned, self.looks)
            if type(part).before_step is not Method.before_step:
                # Keyed by the step: made again after a stop or for want of memory, it draws the same.
                with keyed(self._spec.seed, "before step", part.name, step):
                    part.before_step(self._tuned, step + 1, total)
        for one, course in self._filling("before_step"):
            one.before_step(course)
        self._rest()
        idle = [one.idle(course) for one, course in self._filling("idle")]
        return "; ".join(idle) if all(idle) else ""

    def _rest(self) -> None:
        """Let lie still what a strategy does not name; of several strategies, what all name learns."""
        learning = self.phases.learning(self._optimiser.named)
        for one, course in self._filling("trains"):
            named = one.trains(course)
            if named is None:
                continue
            unknown = sorted(set(named) - set(self._optimiser.named))
            if unknown:
                raise ConfigError(f"strategy {one.name}: {unknown[0]!r} is no trained tensor of this run.")
            learning &= set(named)
        if not learning:
            who = [p.name for p in (self.phases.part,) if p is not None]
            names = " and ".join([*who, *(one.name for one, _ in self._filling("trains"))])
            raise ConfigError(f"step {self._progress.step}: {names} leave nothing to train. Choose other settings.")
        resting = frozenset(self._optimiser.named) - learning - self._optimiser.joined
        for name in self.resting ^ resting:
            self._optimiser.named[name].requires_grad_(name not in resting)
        if any(one.forgets for one, _ in self._asked):
            self._optimiser.forget(resting - self.resting)
        self.resting = resting

    @contextmanager
    def trying(self) -> Iterator[None]:
        """Within, what is made is the trial before step 1."""
        self._progress.trying = True
        try:
            yield
        finally:
            self._progress.trying = False

    def wake(self) -> bool:
        """Let all that any phase trains learn until the next step, to find out what memory holds.

        Returns:
            whether there are phases.
        """
        if self.phases:
            for name in self.resting:
                self._optimiser.named[name].requires_grad_(True)
            self.resting = frozenset()
        return bool(self.phases)

    def settled(self, step: int, total: int) -> bool:
        """Whether what there is after `step` steps may be selected: what an early phase gives is not what is stored."""
        return not self._spec.eval.selects or self.phases.settled(step, total)

    def batches(self, batches: list[Batch]) -> list[Batch]:
        """The micro-batches of the step, as a strategy chooses them; their states are kept for those that read them."""
        owner = next(self._filling("batches"), None)
        if owner is not None:
            batches = owner[0].batches(owner[1], [batch.to(self._device) for batch in batches])
        for one, course in self._asked:
            if len(batches) > 1 and "rows" in one.reads and not neutral(one):
                look_at_rows(course, [batch.to(self._device) for batch in batches])
        return batches

    def gradient(self, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[float] | None:
        """The losses of a gradient that a strategy makes, penalties added to it; None where none does."""
        owner = next(self._filling("gradient"), None)
        if owner is None:
            return None
        n_targets = max(1, sum(batch.n_targets for batch in batches))

        def one(index: int, batch: Batch) -> Tensor:
            self._piece = Piece(batch=batch.to(self._device), index=index, n_targets=n_targets)
            return loss(index, batch)

        losses = owner[0].gradient(owner[1], [batch.to(self._device) for batch in batches], one)
        for penalty in self.penalties():
            torch.autograd.backward(penalty)
        return torch.stack(losses).float().tolist()

    # ------------------------------------------------------------------ a micro-batch

    def passes(
        self, index: int, batch: Batch, n_targets: int, loss: Callable[[], Tensor]
    ) -> Generator[Tensor, None, None]:
        """The losses of one micro-batch, each a sum over targets; the caller goes backward after each.

        Args:
            n_targets: of the whole step.
            loss: one forward pass.
        """
        if not self._asked:
            yield loss()
            return
        self._piece = Piece(batch=batch.to(self._device), index=index, n_targets=n_targets)
        owner = next(self._filling("passes"), None)
        if owner is None:
            yield loss()
        else:
            yield from owner[0].passes(owner[1], self._piece, loss)

    def loss(self, forward: Callable[[], Any]) -> Any:
        """The loss of one forward pass, with all that is asked around it."""
        inner = forward
        for part in self._parts:
            inner = _around_method(part, self._tuned, inner)
        if any(self._filling("weigh")):
            inner = partial(self._weighed, inner)
        for one, course in self._filling("loss"):
            assert self._piece is not None
            inner = _around_strategy(one, course, self._piece, inner)
        return inner()

    def _weighed(self, inner: Callable[[], Any]) -> Any:
        """The loss with each target's own multiplied by what strategies say."""
        assert self._piece is not None
        result = inner()
        told = told_of(self._task, result)
        factor = torch.ones_like(told.losses)
        for one, course in self._filling("weigh"):
            factor = factor * one.weigh(course, self._piece, told)
        result.loss = result.loss + ((factor - 1) * told.losses).sum()  # what methods have added stays
        return result

    # ------------------------------------------------------------------ a whole gradient

    def penalties(self) -> Iterator[Tensor]:
        """What is added to the gradient once a step."""
        for part in self._parts:
            extra = part.extra_loss(self._tuned)
            if extra is not None:
                yield extra
        for one, course in self._filling("penalty"):
            extra = one.penalty(course)
            if extra is not None:
                yield extra

    def after_backward(self, step: int, total: int) -> None:
        """The gradient is whole, unscaled and unclipped. `step` counts from 1."""
        for name in self.resting:
            # Also where something has asked for gradients again since: what rests has none, so it does not move.
            self._optimiser.named[name].grad = None
        for part in self._parts:
            part.after_backward(self._tuned, step, total)
        for one, course in self._filling("after_backward"):
            one.after_backward(course)

    @property
    def change_gradients(self) -> bool:
        """Whether a gradient may be another since backward: by somebody who was asked, or by an update mask."""
        masks = (u.mask for t in self._tuned.tunings.values() for u in t.unfrozen.values())
        attached = any(t.masks for t in self._tuned.tunings.values())
        return self._looks_back or bool(self.resting) or attached or any(m is not None for m in masks)

    def rate(self, step: int, total: int) -> float:
        """Share of the peak rate at step `step`, from 0: a strategy's, or the schedule of the spec."""
        owner = next(self._filling("rate"), None)
        if owner is not None:
            share = owner[0].rate(step + 1, total)
        else:
            at, length, rate = self.phases.schedule(step + 1, total)
            share = rate * factor(self._spec.optim.schedule, at, length, self._spec.optim.warmup)
        self._progress.share = share
        return share

    def after_step(self, step: int, total: int) -> None:
        """Weights have moved. `step` counts from 1."""
        for part in self._parts:
            part.on_step(self._tuned, step, total)
        for one, course in self._filling("after_step"):
            one.after_step(course)

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """Within, the weights are those that would be kept if the run ended here."""
        owner = next(self._filling("kept"), None)
        if owner is None:
            yield
            return
        with owner[1].holding(owner[0].kept(owner[1])):
            self._tuned.state.constrain()
            yield

    def finish(self) -> None:
        """After the last step."""
        for one, course in self._filling("kept"):
            with torch.no_grad():
                for name, value in one.kept(course).items():
                    self._optimiser.named[name].copy_(value)
            self._tuned.state.constrain()
        for one, course in self._filling("finish"):
            one.finish(course)

    def numbers(self) -> dict[str, float]:
        """What strategies noted for this step's line of the log."""
        return dict(self._progress.numbers)

    # ------------------------------------------------------------------ what lasts

    def state(self) -> dict[str, Any]:
        """Plain facts that last, for a checkpoint; nothing without strategies and phases."""
        found: dict[str, Any] = {"phase": self.phases.entered} if self.phases else {}
        if self._asked:
            found["strategies"] = {one.name: dict(course.memory.facts) for one, course in self._asked}
        return found

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors that last, for a checkpoint; nothing without strategies that remember some."""
        held = {f"{one.name}|{n}": t for one, course in self._asked for n, t in course.memory.tensors.items()}
        held |= {
            f"{one.name}|numbers|{n}": p.detach() for one, course in self._asked for n, p in course.numbers.items()
        }
        return {"strategies": held} if held else {}

    def load(self, state: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
        """The inverse of `state` and `tensors`."""
        self.phases.entered = int(state.get("phase", -1))
        held = dict(tensors.get("strategies", {}))
        for one, course in self._asked:
            course.memory.facts.clear()
            course.memory.facts.update(state.get("strategies", {}).get(one.name, {}))
            for n, number in course.numbers.items():
                with torch.no_grad():
                    number.copy_(held.pop(f"{one.name}|numbers|{n}"))
            course.memory.tensors.clear()
            course.memory.tensors.update(
                {n.removeprefix(f"{one.name}|"): t for n, t in held.items() if n.startswith(f"{one.name}|")}
            )


def _join(one: Strategy, course: Course) -> None:
    """Let a strategy's own numbers train."""
    with keyed(course.seed, "numbers", one.name):
        found = one.numbers(course)
    for n, value in found.items():
        course.numbers[n] = nn.Parameter(value.detach().clone().to(course.device))
        course.optimiser.join(f"{one.name}/{n}", course.numbers[n])


def _around_method(part: Method, tuned: Tuned, inner: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: part.loss(tuned, inner)


def _around_strategy(one: Strategy, course: Course, piece: Piece, inner: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: one.loss(course, piece, inner)

"""The range test of learning rates: some steps at rising rates show where the loss falls and where it bursts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from luthier.core import ConfigError
from luthier.runs import RunFolder
from luthier.runs.spec import RunSpec
from luthier.training.listener import Listener
from luthier.training.loop import Loop
from luthier.training.strategy import fills
from luthier.workflow.build import build
from luthier.workflow.preparation import prepare

__all__ = ["RangeTest", "find_lr", "range_test"]

SMOOTH = 0.8  # share of the running mean that each loss leaves
BURST = 2.0  # a smoothed loss this many times the lowest ends the test


@dataclass(frozen=True, kw_only=True)
class RangeTest:
    """What rising rates did.

    Attributes:
        rates, losses: of each step.
        smoothed: running means of the losses, without the bias of their start.
        steepest: the rate at which the smoothed loss fell most quickly; None where it fell no further than single
            losses scatter around it.
        lowest: the rate at which it was lowest.
        begins: the first rate at which a tenth of the whole fall was behind.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    steepest: float | None
    lowest: float | None
    begins: float | None


class _Nowhere:
    """A run's folder that keeps nothing."""

    path = Path()

    def event(self, kind: str, **facts: Any) -> None:
        pass


def find_lr(
    spec: RunSpec, *, low: float = 1e-6, high: float = 1.0, steps: int = 60, listener: Listener | None = None
) -> RangeTest:
    """Try rates from `low` to `high` on the first rows of a run. Writes nothing.

    Raises:
        ConfigError: bounds that are none, or an optimiser that updates inside the backward pass.
    """
    if not 0 < low < high or steps < 3:
        raise ConfigError(f"find-lr: {steps} steps from {low:g} to {high:g}: give 0 < low < high, and 3 steps or more.")
    if spec.optim.name == "lomo":
        raise ConfigError("find-lr: optim.name = lomo updates inside the backward pass. Test with sgd, its plain form.")
    listener = listener or Listener()
    prepared = prepare(spec, listener.say)
    if any(fills(one, "optimiser") for one in prepared.strategies):
        raise ConfigError("find-lr: a strategy of this run moves the numbers itself. Test without it.")
    return range_test(build(prepared)(cast(RunFolder, _Nowhere()), listener), low, high, steps)


def range_test(loop: Loop, low: float, high: float, steps: int) -> RangeTest:
    """The same on a loop before its first step, which is put back to where it was, bit for bit."""
    tensors = {name: t.detach().clone() for name, t in loop.tuned.state.tensors().items()}
    moments = {name: t.detach().clone() for name, t in loop.optimiser.tensors().items()}
    rates, losses, means = [], [], []
    mean = 0.0
    loop.moments.start()
    try:
        for step, rate in enumerate(np.geomspace(low, high, steps).tolist()):
            loop.signals.check()
            loss = _step_at(loop, step, rate)
            if not math.isfinite(loss):
                break
            mean = SMOOTH * mean + (1 - SMOOTH) * loss
            rates.append(rate)
            losses.append(loss)
            means.append(mean / (1 - SMOOTH ** (step + 1)))
            if step > 3 and means[-1] > BURST * min(means):
                break
    finally:
        loop._forget()
        loop.tuned.state.load_tensors(tensors)
        loop.optimiser.load(moments)
    return _read(rates, losses, means)


def _step_at(loop: Loop, step: int, rate: float) -> float:
    """One step at a rate; the mean loss before it."""
    loop.set_mode(training=True)
    loop.moments.before_step(step, loop.total, loop.feed.at(step)[0])
    found, norm, pieces = loop._whole_gradient(step, loop.feed.cut(step))
    if pieces and math.isfinite(norm):
        loop.optimiser.clip(norm)
        loop.optimiser.step(rate / loop.optimiser.lr)
        loop.tuned.state.constrain()
        loop.moments.after_step(step + 1, loop.total)
    loop._forget()
    return sum(found) if math.isfinite(norm) else math.inf


def _read(rates: list[float], losses: list[float], means: list[float]) -> RangeTest:
    steepest = lowest = begins = None
    least = int(np.argmin(means)) if means else 0
    highest = max(means[: least + 1], default=0.0)
    noise = float(np.std(np.subtract(losses, means)[: least + 1])) if least else 0.0
    if least > 0 and highest - means[least] > noise:  # else it is no fall, but how rows differ
        falls = np.diff(means[: least + 1])
        steepest, lowest = rates[int(np.argmin(falls)) + 1], rates[least]
        tenth = highest - 0.1 * (highest - means[least])
        after = means.index(highest)
        begins = next(r for r, m in zip(rates[after:], means[after:], strict=True) if m <= tenth)
    return RangeTest(
        rates=tuple(rates), losses=tuple(losses), smoothed=tuple(means), steepest=steepest, lowest=lowest, begins=begins
    )

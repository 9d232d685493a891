"""Guards of the loop: the first steps must change something, numbers must stay finite and near where they were."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.core import Diverged, NothingTrains
from luthier.surgery import Tuned

__all__ = ["FIRST_STEPS", "LossScale", "NoOpGuard", "NumberGuard"]

FIRST_STEPS = 3


class NoOpGuard:
    """Within the first sound steps every trained target has received a gradient, and something has moved.

    Otherwise training would be a silent no-op: the classic of the field (a frozen base under checkpointing, a dead
    branch, labels that are all masked). A step of which a module says `unasked` had no row for the weights, and does
    not count.
    """

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._targets = _targets(tuned)
        self._named = tuned.trained()
        self._asked: set[str] = set()  # targets that were to learn in a step
        self._live: set[str] = set()
        self._moved = False
        self._counts = True
        self._start = _sums(tuned)
        self.steps = 0

    def after_backward(self, has_gradient: Callable[[Tensor], bool], resting: Collection[str] = ()) -> None:
        """Note which targets have a gradient that is not all zeros.

        Args:
            resting: names of trained tensors that were not asked to learn in this step.
        """
        asleep = {id(self._named[name]) for name in resting}
        asleep |= {id(p) for module in self._tuned.edited.resting() for p in module.parameters()}
        placed = (m for tuning in self._tuned.tunings.values() for m in tuning.modules_by_key().values())
        self._counts = not any(getattr(module, "unasked", False) for module in placed)
        if not self._counts:
            return
        for target, parameters in self._targets.items():
            if any(id(p) not in asleep for p in parameters):
                self._asked.add(target)
            if target not in self._live and any(has_gradient(p) for p in parameters):
                self._live.add(target)

    def after_update(self) -> None:
        """Count a step whose update was made."""
        self.steps += self._counts
        self._moved = self._moved or _sums(self._tuned) != self._start

    @property
    def due(self) -> bool:
        """Whether enough steps have been seen."""
        return self.steps >= FIRST_STEPS

    def check(self, *, must_move: bool = True, idle: str = "") -> None:
        """After the last of the first steps.

        Args:
            must_move: off for a search, which may find nothing better in so few.
            idle: why there was nothing to learn in a step that made no update.

        Raises:
            NothingTrains: names the dead targets, or says that no number has moved.
        """
        if idle and not self.steps:
            raise NothingTrains(f"No result: in every step there was nothing to learn. In the last, {idle}")
        dead = [t for t in self._targets if t in self._asked and t not in self._live and not _may_rest(t)]
        attached = [t for t in dead if not t.startswith(("model/", "head/")) and ":model/" not in t]
        if attached or len(dead) == len(self._asked):
            named = attached or dead
            shown = ", ".join(named[:5]) + (f" and {len(named) - 5} more" if len(named) > 5 else "")
            raise NothingTrains(
                f"{len(named)} of {len(self._asked)} trained places got no gradient in {self.steps} steps: {shown}. "
                "They cannot learn: choose other sites, or check that the loss depends on them."
            )
        if must_move and not self._moved:
            raise NothingTrains(
                f"no trained number moved in {self.steps} steps. "
                "Check the learning rate, and whether labels are masked."
            )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        state = {"steps": self.steps, "live": sorted(self._live), "moved": self._moved}
        # Where all were asked, as in every run without a strategy, nothing is added to what checkpoints hold.
        return state if self._asked in (set(), set(self._targets)) else {**state, "asked": sorted(self._asked)}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after the tensors of the same checkpoint were loaded."""
        self.steps, self._live, self._moved = int(state["steps"]), set(state["live"]), bool(state["moved"])
        self._asked = set(state.get("asked", self._targets if self.steps else ()))
        self._start = _sums(self._tuned)


def _sums(tuned: Tuned) -> list[tuple[float, float]]:
    # Two sums of each tensor instead of a copy of it: a copy of a whole model would be felt. In pieces, since the wide
    # sum of a tensor is taken from a wide copy.
    found: list[tuple[float, float]] = []
    for parameter in tuned.trained().values():
        values = parameter.detach().flatten()
        total = math.fsum(float(piece.sum(dtype=torch.float64)) for piece in torch.split(values, 1 << 20))
        found.append((total, float(torch.linalg.vector_norm(values))))
    return found


def _targets(tuned: Tuned) -> dict[str, list[Tensor]]:
    targets: dict[str, list[Tensor]] = {}
    for tuning in tuned.tunings.values():
        if tuning.trainable:
            for key_, module in tuning.modules_by_key().items():
                # By what the method fixed: what rests in this step alone asks for no gradient either.
                parameters: list[Tensor] = [
                    p for n, p in module.named_parameters() if f"{key_}.{n}" not in tuning.fixed
                ]
                if parameters and not getattr(module, "may_rest", False):
                    targets[key_] = parameters
            for key_, unfrozen in tuning.unfrozen.items():
                targets[key_] = [unfrozen.parameter]
    return targets


def _may_rest(target: str) -> bool:
    # A key bias adds the same number to every score of a query, so softmax gives it no gradient.
    return target.endswith(".bias") and any(w in target for w in (".key.", ".k_proj.", ".k_lin.", ".k."))


@dataclass
class NumberGuard:
    """Watches losses: what is not finite, or far above what came before, makes no update.

    A loss counts as a spike when it is more than `sigmas` deviations above the window's mean *and* more than twice
    what training started with: a single hard row late in training is far above a small mean and is no fault.
    """

    sigmas: float = 6.0
    window: int = 64
    enough: int = 16
    patience: int = 3
    seen: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    first: list[float] = field(default_factory=list)
    in_a_row: int = 0
    rollbacks: int = 0
    suspects: list[int] = field(default_factory=list)  # examples of the bad steps in a row

    def judge(self, loss: float, norm: float) -> str | None:
        """What is wrong with this step ("non-finite loss", "non-finite gradient", "loss spike"), or None."""
        if not math.isfinite(loss):
            wrong: str | None = "non-finite loss"
        elif not math.isfinite(norm):
            wrong = "non-finite gradient"
        elif self._spike(loss):
            wrong = "loss spike"
        else:
            wrong = None
        if wrong is None:
            # Only sound losses enter the statistics: one NaN would blind them for good.
            self.seen.append(loss)
            if len(self.first) < 8:
                self.first.append(loss)
            self.in_a_row = 0
            self.suspects.clear()
        else:
            self.in_a_row += 1
        return wrong

    def suspect(self, examples: Iterable[int]) -> None:
        """Note the examples of a bad step."""
        self.suspects += [int(i) for i in examples]

    def went_back(self, rollbacks: int) -> None:
        """After a roll-back, `rollbacks` in all: the steps to come are judged anew."""
        self.rollbacks, self.in_a_row = rollbacks, 0
        self.suspects.clear()

    def _spike(self, loss: float) -> bool:
        if len(self.seen) < self.enough:
            return False
        mean = sum(self.seen) / len(self.seen)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in self.seen) / len(self.seen))
        return loss > mean + self.sigmas * deviation and loss > 2 * max(self.first)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "seen": list(self.seen),
            "first": self.first,
            "in_a_row": self.in_a_row,
            "rollbacks": self.rollbacks,
            "suspects": self.suspects,
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.seen = deque(state["seen"], maxlen=self.window)
        self.first, self.suspects = list(state["first"]), list(state["suspects"])
        self.in_a_row, self.rollbacks = int(state["in_a_row"]), int(state["rollbacks"])


@dataclass
class LossScale:
    """fp16 loses small gradients; the loss is scaled up by a power of two, and the gradients back down.

    Micikevicius et al. 2018, "Mixed Precision Training", arXiv:1710.03740, section 3.2. In other precisions the scale
    is 1 and stays 1.
    """

    on: bool
    value: float = 1.0
    good: int = 0
    floor: float = 1.0
    patience: int = 2000

    def __post_init__(self) -> None:
        if self.on:
            self.value = 2.0**16

    def fits(self, loss: float, norm: float) -> bool:
        """Judge one step's gradient, and move the scale; False means that it overflowed and makes no update.

        Raises:
            Diverged: it overflows at the smallest scale.
        """
        if not self.on or not math.isfinite(loss):
            return True  # a loss that is not finite is no matter of scale
        if math.isfinite(norm):
            self.good += 1
            if self.good >= self.patience:
                self.value, self.good = self.value * 2, 0
            return True
        if self.value <= self.floor:
            raise Diverged(
                f"fp16 gradients overflow even at loss scale {self.value:g}. Use precision bf16 or fp32, or lower the "
                "learning rate; the last good checkpoint stays."
            )
        self.value, self.good = self.value / 2, 0
        return False

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"value": self.value, "good": self.good}

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        if self.on:
            self.value, self.good = float(state["value"]), int(state["good"])

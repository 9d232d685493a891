"""Guards of the loop: the first steps must change something, numbers must stay finite and near where they were."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from luthier.core import NothingTrains
from luthier.surgery import Tuned

__all__ = ["FIRST_STEPS", "NoOpGuard", "NumberGuard"]

FIRST_STEPS = 3


class NoOpGuard:
    """Within the first steps every declared target has received a gradient and moved, and the output has changed.

    Otherwise training would be a silent no-op: the classic of the field (a frozen base under checkpointing, a dead
    branch, labels that are all masked).
    """

    def __init__(self, tuned: Tuned) -> None:
        self._tuned = tuned
        self._targets = _targets(tuned)
        self._live: set[str] = set()
        self._start = {n: p.detach().clone() for n, p in tuned.trained().items()}
        self.done = False

    def after_backward(self) -> None:
        """Note which targets have a gradient."""
        for target, parameters in self._targets.items():
            if target not in self._live and any(p.grad is not None and bool(p.grad.any()) for p in parameters):
                self._live.add(target)

    def check(self) -> None:
        """After the last of the first steps.

        Raises:
            NothingTrains: names the dead targets, or says that no number has moved.
        """
        self.done = True
        dead = [t for t in self._targets if t not in self._live and not _may_rest(t)]
        attached = [t for t in dead if not t.startswith(("model/", "head/")) and ":model/" not in t]
        if attached or len(dead) == len(self._targets):
            shown = ", ".join((attached or dead)[:5]) + (f" and {len(dead) - 5} more" if len(dead) > 5 else "")
            raise NothingTrains(
                f"{len(dead)} of {len(self._targets)} trained places got no gradient in {FIRST_STEPS} steps: {shown}. "
                "They cannot learn: choose other sites, or check that the loss depends on them."
            )
        moved = any(not torch.equal(self._start[n], p) for n, p in self._tuned.trained().items())
        if not moved:
            raise NothingTrains(
                f"no trained number moved in {FIRST_STEPS} steps. "
                "Check the learning rate, and whether labels are masked."
            )
        self._start.clear()

    def resting(self) -> list[str]:
        """Tensors of the model that have had no gradient so far: said, not refused."""
        return [t for t in self._targets if t not in self._live]


def _targets(tuned: Tuned) -> dict[str, list[Tensor]]:
    targets: dict[str, list[Tensor]] = {}
    for tuning in tuned.tunings.values():
        if tuning.trainable:
            for key_, module in tuning.modules_by_key().items():
                parameters: list[Tensor] = [p for p in module.parameters() if p.requires_grad]
                if parameters:
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
        else:
            self.in_a_row += 1
        return wrong

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
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.seen = deque(state["seen"], maxlen=self.window)
        self.first = list(state["first"])
        self.in_a_row, self.rollbacks = int(state["in_a_row"]), int(state["rollbacks"])

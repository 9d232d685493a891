"""Where an update inside the backward pass (`optim.name = "lomo"`) is not what it would be after it: refused here."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core import ConfigError
from luthier.data.batches import Batches
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, Tuned
from luthier.training.strategy import Strategy, fills
from luthier.training.whole_steps import why_cut

__all__ = ["refuse_inexact"]

_WANTS = {
    "after_backward": "looks at the gradients of the whole step before the update",
    "on_step": "looks at the gradients of the whole step after the update",
    "extra_loss": "adds a penalty with a backward pass of its own",
    "phases": "lets only some of what trains learn at a time",
    "prepare": "looks at gradients of the data before the first step",
}

_WHOLE_GRADIENT = ("gradient", "passes", "penalty", "after_backward", "trains")
"""Moments of a strategy that need a gradient which is still there after the backward pass, or several passes."""


def refuse_inexact(spec: RunSpec, tuned: Tuned, batches: Batches, strategies: Sequence[Strategy] = ()) -> None:
    """Every reason at once why steps would come out otherwise than by plain gradient descent.

    Raises:
        ConfigError: a step of several backward passes; a method that wants to see all gradients of a step.
    """
    wrong = []
    if reason := why_cut(spec, batches):
        wrong.append(f"a gradient that is dropped at once cannot be summed over micro-batches: {reason}")
    for tuning in tuned.tunings.values():
        for part in tuning.method.parts():
            for name, why in _WANTS.items():
                if getattr(type(part), name) is not getattr(Method, name):
                    wrong.append(f"{part.name} {why}. Use optim.name = sgd or adamw with it.")
    for one in strategies:
        fits = [m for m in _WHOLE_GRADIENT if fills(one, m)]
        if fits:
            wrong.append(f"strategy {one.name} fills {', '.join(fits)}. Use optim.name = sgd or adamw with it.")
    if wrong:
        raise ConfigError("optim.name = lomo updates inside the backward pass: " + "\n".join(wrong))

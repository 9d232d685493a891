"""Where an update inside the backward pass (`optim.name = "lomo"`) is not what it would be after it: refused here."""

from __future__ import annotations

from collections.abc import Sequence

from luthier.core import ConfigError
from luthier.data.batches import Batches, cut
from luthier.runs.spec import RunSpec
from luthier.surgery import Method, Tuned
from luthier.training.strategy import Strategy, fills

__all__ = ["refuse_inexact"]

_WANTS = {
    "after_backward": "looks at the gradients of the whole step before the update",
    "on_step": "looks at the gradients of the whole step after the update",
    "extra_loss": "adds a penalty with a backward pass of its own",
    "phases": "lets only some of what trains learn at a time",
    "prepare": "looks at gradients of the data before the first step",
}

_WHOLE_GRADIENT = ("passes", "penalty", "after_backward", "trains")
"""Moments of a strategy that need a gradient which is still there after the backward pass, or several passes."""


def refuse_inexact(spec: RunSpec, tuned: Tuned, batches: Batches, strategies: Sequence[Strategy] = ()) -> None:
    """Every reason at once why steps would come out otherwise than by plain gradient descent.

    Raises:
        ConfigError: a step of several backward passes; a method that wants to see all gradients of a step.
    """
    wrong = []
    if spec.batch.accumulate > 1:
        wrong.append(
            f"batch.accumulate is {spec.batch.accumulate}: a gradient that is dropped at once cannot be summed over "
            "micro-batches. Use 1."
        )
    else:
        lengths, order = batches.examples.lengths, batches.order
        widest = (-lengths).argsort(kind="stable")[: order.size]
        pieces = cut(widest, lengths, spec.batch.tokens, order.size, spec.batch.pad_to)
        if len(pieces) > 1:
            wide = -(-int(lengths.max()) // spec.batch.pad_to) * spec.batch.pad_to
            wrong.append(
                f"{order.size} rows of up to {wide} tokens are cut into micro-batches at batch.tokens = "
                f"{spec.batch.tokens}, and a step must be one piece. Use batch.tokens = {wide * order.size}, or "
                f"batch.size = {max(1, spec.batch.tokens // wide)}."
            )
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

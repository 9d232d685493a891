"""How a tuned model answers where a method has a say in that: a posterior, say, in place of one set of numbers."""

from __future__ import annotations

from functools import partial
from typing import Any

from luthier.surgery.method import Method, Objective
from luthier.surgery.tuned import Tuned

__all__ = ["answered", "answerers"]


def answerers(tuned: Tuned) -> list[Method]:
    """The methods of what acts that make their answers of more than a plain pass."""
    parts = (part for tuning in tuned.tunings.values() if tuning.active for part in tuning.method.parts())
    return [part for part in parts if type(part).answer is not Method.answer]


def answered(tuned: Tuned, forward: Objective) -> Any:
    """What the model answers to one batch, of which `forward` is the plain pass."""
    for part in answerers(tuned):
        forward = partial(part.answer, tuned, forward)
    return forward()

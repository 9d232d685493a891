"""Strategies that learn from two answers to one prompt, one better.

One base is in memory: the policy is the base with the tuning awake, the reference the same base with it asleep.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from contextlib import nullcontext
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from luthier.training.answers import Answer
from luthier.training.course import Course
from luthier.training.strategy import Strategy

__all__ = ["Preference", "judge_of", "keep_reference"]


class Preference(Strategy):
    """A loss of pairs. The objective asks it, so that training, selection and `luthier evaluate` read one formula."""

    learns: ClassVar[str] = "preference"
    tiny_kind: ClassVar[str] = "llama-pairs"

    @property
    def reference(self) -> bool:
        """Whether the base is asked about both answers."""
        return False

    @abstractmethod
    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        """The loss of each pair, (pairs,). marks: (pairs, 2), the share of judges for the first, and by how much."""

    @abstractmethod
    def reward(self, answer: Answer) -> Tensor:
        """How good each answer is by what has been learnt, (pairs,): what evaluations compare."""


def judge_of(strategies: Iterable[Strategy]) -> Preference | None:
    """The one of a run's strategies that compares answers."""
    return next((one for one in strategies if isinstance(one, Preference)), None)


def keep_reference(course: Course) -> None:
    """Ask the base about every example once, before step 1; every checkpoint holds what it said.

    Called before each step: asked anew only where nothing is held.
    """
    assert course.objective is not None, "a run has one"
    if "reference" not in course.memory.tensors:
        kept = torch.zeros(len(course.examples()), 2)
        for batch in course.cut(np.arange(len(kept), dtype=np.int64)):
            with course.precision.autocast(course.device) if course.precision is not None else nullcontext():
                kept[torch.from_numpy(batch.rows)] = course.objective.base_chances(batch).float().cpu()
        course.memory.tensors["reference"] = kept
    course.objective.reference = course.memory.tensors["reference"]

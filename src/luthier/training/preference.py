"""Strategies that learn how good whole answers are: which of two is better, or whether one is any good.

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

__all__ = ["Judgement", "Preference", "Ranking", "Weighing", "judge_of", "keep_reference"]


class Weighing(Strategy):
    """A loss of answers. The objective asks it, so that training, selection and `luthier evaluate` read one formula."""


class Preference(Weighing):
    """A loss of pairs, from the log-probabilities of both answers.

    Class fact:
        reference: the base is asked about both answers too.
    """

    learns: ClassVar[str] = "preference"
    tiny_kind: ClassVar[str] = "llama-pairs"
    reference: ClassVar[bool] = False

    @abstractmethod
    def losses(self, chosen: Answer, rejected: Answer, marks: Tensor) -> Tensor:
        """The loss of each pair, (pairs,). marks: (pairs, 2), the share of judges for the first, and by how much."""

    @abstractmethod
    def reward(self, answer: Answer) -> Tensor:
        """How good each answer is by what has been learnt, (pairs,): what evaluations compare."""


class Judgement(Weighing):
    """A loss of single answers, each liked or not. The rows of a step see one another."""

    learns: ClassVar[str] = "judged"
    tiny_kind: ClassVar[str] = "llama-judged"
    whole_step: ClassVar[bool] = True
    reference: ClassVar[bool] = True
    elsewhere: ClassVar[bool] = True

    @abstractmethod
    def losses(self, answer: Answer, liked: Tensor, elsewhere: Answer | None) -> Tensor:
        """The loss of each answer, (answers,).

        Args:
            liked: 1 or 0.
            elsewhere: answers to other prompts of the step, without gradient; None where rows are scored.
        """

    @abstractmethod
    def reward(self, answer: Answer) -> Tensor:
        """How good each answer is by what has been learnt, (answers,)."""


class Ranking(Weighing):
    """A loss of pairs, from the numbers that a new head gives both answers."""

    learns: ClassVar[str] = "reward"
    tiny_kind: ClassVar[str] = "llama-rewards"

    @abstractmethod
    def losses(self, rewards: Tensor, marks: Tensor) -> Tensor:
        """The loss of each pair, (pairs,). rewards: (pairs, 2). marks: see `Preference.losses`."""


def judge_of(strategies: Iterable[Strategy]) -> Weighing | None:
    """The one of a run's strategies that weighs answers."""
    return next((one for one in strategies if isinstance(one, Weighing)), None)


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

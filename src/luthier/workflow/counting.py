"""What a method trains on a model, by its settings: counted on the model's structure, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from luthier.data.tasks import Task
from luthier.runs.spec import RunSpec
from luthier.surgery import METHODS, compose
from luthier.training.strategy import split_settings
from luthier.workflow.outline import outline_of

__all__ = ["Counting", "whole_settings"]


class Counting:
    """Counts methods on the model of a run.

    Raises:
        ModelError, AnatomyError: the model cannot be read.
    """

    def __init__(self, base: RunSpec, task: Task) -> None:
        self.base = base
        self.anatomy = outline_of(base.model).skeleton(task, torch.float32).anatomy

    def trained(self, method: str, settings: Mapping[str, Any]) -> int:
        """Numbers that a method with these settings, and the run's, trains beside a new head.

        Raises:
            Any LuthierError: the settings cannot work, or the method has no place in the model.
        """
        every = {**self.base.settings, **settings}
        _, own = split_settings(self.base.strategy, every, compose.setting_names(method))
        with torch.device("meta"):
            return compose.method(method, own).n_params(self.anatomy)


def whole_settings(method: str) -> tuple[str, ...]:
    """The settings of one method whose defaults are numbers above 0; none for methods in a sum."""
    if method not in METHODS.names():
        return ()
    return tuple(s.name for s in METHODS.card(method).settings if s.default.isdecimal() and int(s.default) > 0)

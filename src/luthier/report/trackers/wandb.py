"""Weights & Biases: the project "luthier" (WANDB_PROJECT names another; WANDB_MODE=offline sends nothing)."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["PACKAGE", "Sink"]

PACKAGE = "wandb"


class Sink:
    def __init__(self, run: str, facts: dict[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(project=os.environ.get("WANDB_PROJECT", "luthier"), name=run, config=facts)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self._run.log(numbers, step=step)

    def close(self, end: str) -> None:
        self._run.finish(exit_code=0 if end == "finished" else 1)

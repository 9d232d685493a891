"""TensorBoard: event files in ./tensorboard/NAME, which TensorBoard shows of that folder."""

from __future__ import annotations

from typing import Any

__all__ = ["PACKAGE", "Sink"]

PACKAGE = "tensorboard"


class Sink:
    def __init__(self, run: str, facts: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(f"tensorboard/{run}")
        lines = "\n".join(f"    {name} = {value!r}" for name, value in facts.items())
        self._writer.add_text("specification", lines)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, end: str) -> None:
        self._writer.close()

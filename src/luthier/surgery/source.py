"""A saved tuning as the material of another: its numbers, and what they were made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

__all__ = ["Source"]


@dataclass(frozen=True)
class Source:
    """What a method is handed of a saved tuning. Heads are left out: a new task has a head of its own.

    Attributes:
        name: of its run's folder.
        folder: where it was read.
        method: how the method that made it is spelt, and its settings.
        tensors: by canonical name, as the file holds them.
        base: of which base it is a tuning, as the file says.
        digest: sha256 of the file.
    """

    name: str
    folder: str
    method: str
    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)
    base: Mapping[str, Any] = field(repr=False)
    digest: str

    def part(self, key: str) -> dict[str, Tensor]:
        """The tensors of one module, by short names: of `ffn_out@0`, `prompt`."""
        return {n.removeprefix(f"{key}."): t for n, t in self.tensors.items() if n.startswith(f"{key}.")}

    def facts(self) -> dict[str, str]:
        """What a tuning that was made of it says of it."""
        return {"name": self.name, "method": self.method, "sha256": self.digest}

"""Which tuning acts in which row of a batch, and which tunings cannot act in some rows only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from luthier.core import ConfigError
from luthier.surgery.edited_model import EditedModel
from luthier.surgery.tuning import ATTENTION, BRANCH, FIRST, ORDER, PREFIX, Master, Tuning

__all__ = ["RowNames", "row_problem"]


def row_problem(edited: EditedModel, tuning: Tuning) -> str | None:
    """Why this tuning cannot act in some rows of a batch only, or None."""
    name, decodes = tuning.tuning_name, edited.anatomy.is_decoder or edited.anatomy.is_encoder_decoder
    if tuning.prompts():
        return "puts vectors before the text, so its rows are longer than the others"
    if PREFIX in tuning.claims:
        return "puts keys before those of the text in every row's attention"
    if any(claim.startswith(ATTENTION) for claim in tuning.claims):
        return "attends in a way of its own, in every row"
    if BRANCH in tuning.claims:
        return "adds a network beside the whole model"
    if FIRST in tuning.claims:
        return "runs the whole batch twice"
    if ORDER in tuning.claims:
        return "computes the whole batch to first order"
    if any(not key.startswith("head/") for key in tuning.unfrozen):
        return "changes tensors of the model itself, which all rows share"
    for socket in edited.sockets():
        if any(s.tuning == name and not isinstance(s.module, Master) for s in socket.substitutes):
            return "computes tensors of the model anew, which all rows share"
        if any(p.tuning == name and (p.site.expert is not None or ".experts." in p.site.path) for p in socket.plugs):
            return "sits in experts, which see tokens without their rows"
        if decodes and any(p.tuning == name and p.attachment.keeps_keys for p in socket.plugs):
            return "keeps something of each token in the cache of all rows"
        if any(p.tuning == name and p.at_end and (p.changes_input or p.has_around) for p in socket.plugs):
            return "takes part in how blocks are called, which is done once for all rows"
    return None


class RowNames:
    """Which tuning acts in which row of the batch; None for the base."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self.times = 1  # beams or samples of each row, which follow one another
        self.only = self.names[0] if len(set(self.names)) == 1 else None
        self.alike = len(set(self.names)) == 1
        self._kept: dict[Any, Any] = {}

    def __len__(self) -> int:
        return len(self.names) * self.times

    def match(self, batch: int, generating: bool) -> None:
        """Compare the rows that are named with those that are given.

        Raises:
            ConfigError: they differ. While generating, whole multiples are beams or samples of each row.
        """
        times, rest = divmod(batch, len(self.names))
        if rest or times == 0 or (times > 1 and not generating):
            raise ConfigError(
                f"rows: {len(self.names)} tunings are named, and the batch has {batch} rows. "
                "Name one tuning, or None for the base, for every row."
            )
        self.times = times

    def index(self, numbers: dict[str, int], none: int, device: torch.device) -> Tensor:
        """(rows,) the number of each row's tuning; `none` where it has none."""
        key = (id(numbers), self.times, device)
        if key not in self._kept:
            listed = [none if n is None else numbers.get(n, none) for n in self.names for _ in range(self.times)]
            # `numbers` is kept too, so that its id stays its own.
            self._kept[key] = (torch.tensor(listed, device=device), numbers)
        found: Tensor = self._kept[key][0]
        return found

    def groups(self, device: torch.device) -> list[tuple[str | None, Tensor]]:
        """Each tuning that acts and the numbers of its rows."""
        key = ("groups", self.times, device)
        if key not in self._kept:
            by_name: dict[str | None, list[int]] = {}
            for i, name in enumerate(n for n in self.names for _ in range(self.times)):
                by_name.setdefault(name, []).append(i)
            self._kept[key] = [(n, torch.tensor(picked, device=device)) for n, picked in by_name.items()]
        found: list[tuple[str | None, Tensor]] = self._kept[key]
        return found

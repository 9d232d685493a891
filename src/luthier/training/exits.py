"""The model's own head asked at every block: what it would answer if the blocks above were not there.

Only where the states between blocks are of the kind that the head reads: a model that norms after each sublayer, as
BERT does. Elsewhere one norm stands behind the last block alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from luthier.core import ConfigError
from luthier.surgery import Tuned
from luthier.training.frozen_features import Trunk

__all__ = ["Exits", "Left", "leave_early"]


class Exits:
    """The places behind the blocks of a tuned model with a head of labels.

    Raises:
        ConfigError: the head cannot read what stands between blocks.
    """

    def __init__(self, tuned: Tuned) -> None:
        anatomy = tuned.anatomy
        if anatomy.pre_norm or anatomy.is_decoder or anatomy.is_encoder_decoder:
            raise ConfigError(
                f"early exits cannot be used with {anatomy.model_type}: its head reads states behind one last norm, "
                "which those between blocks have not passed. Use an encoder such as BERT, MiniLM or MPNet."
            )
        self.trunk, self.n_layers = Trunk(tuned.model), anatomy.n_layers
        if isinstance(self.trunk.pooler, nn.Linear):
            raise ConfigError(
                f"early exits cannot be used with {anatomy.model_type}: its pooler is a part of a larger step, and "
                "cannot be asked alone. Use an encoder such as BERT, MiniLM or MPNet."
            )
        self.paths = tuple(block.path for block in anatomy.blocks)

    @contextmanager
    def watched(self, seen: Callable[[Tensor], None]) -> Iterator[None]:
        """Within, `seen` is given what each block gives, in the order of the layers: (rows, tokens, d)."""

        def hook(module: Any, args: Any, out: Any) -> None:
            seen(out if isinstance(out, Tensor) else out[0])

        with ExitStack() as stack:
            for path in self.paths:
                stack.callback(self.trunk.model.get_submodule(path).register_forward_hook(hook).remove)
            yield

    def logits(self, inputs: Mapping[str, Tensor], states: Tensor) -> Tensor:
        """What the head makes of states, through the pooler where there is one: (rows, labels)."""
        from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling

        self.trunk.kind = BaseModelOutput if self.trunk.pooler is None else BaseModelOutputWithPooling
        own = {n: t for n, t in inputs.items() if not n.startswith("row_")}
        with self.trunk.standing_in(states):
            # Not by calling the model: no pass begins here, so nothing of a tuning begins anew.
            found: Tensor = self.trunk.model.forward(**own).logits
        return found


@dataclass(frozen=True)
class Left:
    """Answers, and where each row left.

    Attributes:
        logits: (rows, labels).
        layers: blocks below the exit of each row, (rows,).
        run: blocks that were run, for all rows of the batch together.
        of: blocks of the whole model.
    """

    logits: Tensor
    layers: Tensor
    run: int
    of: int

    @property
    def speed_up(self) -> float:
        """Blocks of the whole model by those that were run; a batch runs until its last row has left."""
        return self.of / self.run


class _AllLeft(Exception):
    """Ends a pass in which no row is left."""


@torch.no_grad()
def leave_early(tuned: Tuned, inputs: Mapping[str, Tensor], threshold: float) -> Left:
    """Answer each row as soon as the head is sure enough of it; blocks that no row needs are not run.

    Args:
        inputs: of one batch.
        threshold: entropy of the answer, as a share of the most there could be, below which a row leaves; 0, never.

    Raises:
        ConfigError: the head cannot read what stands between blocks.
    """
    exits = Exits(tuned)
    rows = len(inputs["input_ids"])
    found: dict[int, Tensor] = {}
    layers = torch.full((rows,), exits.n_layers)
    ran = 0

    def seen(states: Tensor) -> None:
        nonlocal ran
        ran += 1
        if ran == exits.n_layers:
            return  # the model's own answer follows
        logits = exits.logits(inputs, states)
        log_q = torch.log_softmax(logits.float(), -1)
        unsure = -(log_q.exp() * log_q).sum(-1) / math.log(logits.shape[-1])  # (rows,)
        for row in range(rows):
            if row not in found and unsure[row] < threshold:
                found[row], layers[row] = logits[row], ran
        if len(found) == rows:
            raise _AllLeft

    with exits.watched(seen):
        try:
            last = tuned.model(**inputs).logits
            found = {row: found.get(row, last[row]) for row in range(rows)}
        except _AllLeft:
            pass
    return Left(torch.stack([found[row] for row in range(rows)]), layers, ran, exits.n_layers)

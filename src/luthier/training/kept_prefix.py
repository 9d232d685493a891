"""What the lowest blocks of a model give for each training row, kept once they rest for good: they are not run then.

    states of a row behind block k   kept for its real tokens; blocks 1 ... k are passed over, block k + 1 reads them

As with the features of a frozen trunk, a row is always computed in the same group, so a resumed run, which begins with
nothing kept, keeps the same. What is kept equals what the model gives to the bit in that group; beside other rows the
last bits may be others. That a pass which begins behind the blocks gives what a whole one does is tried out on two rows
of every group, as far as the trunk: rows of a group that differ are computed whole, always.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luthier.core import human_bytes
from luthier.data.batches import Batch, Batches
from luthier.surgery import Tuned
from luthier.surgery.stream import stream_of
from luthier.training.frozen_features import LIMIT_BYTES, Groups

__all__ = ["Prefix"]


class _Enough(Exception):
    """Ends a pass behind the blocks that were asked for."""


class Prefix:
    """The states behind the lowest `depth` blocks, for the rows of `batches`.

    Attributes:
        why_not: why nothing is kept, for the log; empty where it is.
        unlike: (rows of the data,), True where a pass that begins behind the blocks was found to give something else.
    """

    def __init__(self, tuned: Tuned, batches: Batches, depth: int) -> None:
        self.tuned, self.batches, self.depth = tuned, batches, depth
        self._groups = Groups(batches)
        self._kept: Tensor | None = None  # (tokens of all rows, d)
        self._in_tuple = False
        self.unlike = np.zeros(len(batches.examples.lengths), dtype=bool)
        self.why_not = self._refusal()

    @property
    def _blocks(self) -> list[nn.Module]:
        """With what stands around them."""
        return [self.tuned.model.get_submodule(block.path) for block in self.tuned.anatomy.blocks[: self.depth]]

    def _refusal(self) -> str:
        anatomy = self.tuned.anatomy
        paths = [block.path for block in anatomy.blocks]
        if anatomy.is_encoder_decoder or len(set(paths)) < len(paths):
            return f"{anatomy.model_type} does not run each of its blocks once, one after the other"
        if self.batches.collator.corruption is not None or self.batches.examples.middles is not None:
            return "a row is read otherwise each time, or as two lines"
        forward = self.tuned.forward
        if forward.prompts is not None or forward.branches or forward.looks:
            return "vectors or a network stand beside the text"
        n_bytes = (
            4 * int(self.batches.examples.lengths.sum()) * int(self.tuned.model.config.get_text_config().hidden_size)
        )
        if n_bytes > LIMIT_BYTES:
            return f"it would take {human_bytes(n_bytes)}"
        return ""

    @contextmanager
    def standing_in(self, batch: Batch) -> Iterator[None]:
        """Within, a pass over the batch begins behind the blocks that rest; where nothing is kept, it is a plain one.

        Not while dropout is on in them: `still` is the caller's.
        """
        if not self.why_not:
            self._groups.meet(batch.rows, batch.inputs["input_ids"].device, self._keep)
        if self.why_not or self.unlike[batch.rows].any():
            yield
            return
        with self._given(self._laid_out(batch)):
            yield

    @contextmanager
    def _given(self, states: Tensor) -> Iterator[None]:
        blocks = self._blocks

        def last(*args: Any, **kwargs: Any) -> Any:
            return (states,) if self._in_tuple else states

        with ExitStack() as stack:
            for block in blocks:
                block.__dict__["forward"] = last if block is blocks[-1] else self._passing(block)
                stack.callback(block.__dict__.pop, "forward")
            yield

    def _passing(self, block: nn.Module) -> Callable[..., Any]:
        """What stands in for a block that is passed over: it gives the states that it is called with."""
        first = next(iter(inspect.signature(block.forward).parameters))

        def passed(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if args else kwargs[first]
            return (x,) if self._in_tuple else x

        return passed

    def _laid_out(self, batch: Batch) -> Tensor:
        """The kept states of a batch: (rows, tokens, d)."""
        assert self._kept is not None
        return _on_padding_zero(self._kept[self._places(batch).to(self._kept.device)], batch)

    def _places(self, batch: Batch) -> Tensor:
        """Where the tokens of its rows are kept."""
        offsets = self.batches.examples.offsets
        return torch.from_numpy(np.concatenate([np.arange(offsets[row], offsets[row + 1]) for row in batch.rows]))

    def _keep(self, batch: Batch) -> None:
        if self.why_not:
            return
        training = [m for m in self.tuned.model.modules() if m.training]
        self.tuned.model.eval()
        try:
            out = self._run(batch)
            states = stream_of(out)
            more = [part for part in out[1:] if isinstance(part, Tensor)] if isinstance(out, tuple | list) else []
            if states.requires_grad:
                self.why_not = "something that trains has a part in what the resting blocks give"
            elif more or isinstance(out, list):
                self.why_not = "its blocks give more than states"
            if self.why_not:
                return
            if self._kept is None:
                self._in_tuple = isinstance(out, tuple)
                self._kept = states.new_zeros((int(self.batches.examples.offsets[-1]), states.shape[-1]))
            self._kept[self._places(batch).to(states.device)] = states[batch.inputs["attention_mask"].bool()]
            self.unlike[batch.rows] = not self._tried(batch)
        finally:
            for module in training:
                module.training = True

    def _run(self, batch: Batch) -> Any:
        """What the last of the blocks gives. With gradients on: what trains in there would show."""
        return self._until(self._blocks[-1], batch)

    def _until(self, module: nn.Module, batch: Batch) -> Any:
        """What a module gives in a pass over the batch, which ends there; the model's own output if it is not met."""
        found: list[Any] = []

        def enough(module: nn.Module, args: Any, out: Any) -> None:
            found.append(out)
            raise _Enough

        handle = module.register_forward_hook(enough)
        try:
            return self.tuned.model(**batch.inputs)
        except _Enough:
            return found[0]
        finally:
            handle.remove()

    @torch.no_grad()
    def _tried(self, batch: Batch) -> bool:
        """Whether the trunk gives the same behind states that stand in, for the first and the last row of a group.

        Not the logits: of a whole group they are the largest thing there is, and what follows reads the trunk alone.
        """
        rows = np.unique(batch.rows[[0, -1]])
        some = self.batches.collator(self.batches.examples, rows).to(batch.inputs["input_ids"].device)
        mask = some.inputs["attention_mask"].bool()
        trunk: Any = getattr(self.tuned.model, "base_model", self.tuned.model)
        whole = _tensors(self._until(trunk, some), mask)
        with self._given(_on_padding_zero(stream_of(self._run(some))[mask], some)):
            behind = _tensors(self._until(trunk, some), mask)
        return len(whole) == len(behind) and all(map(torch.equal, whole, behind))


def _on_padding_zero(states: Tensor, batch: Batch) -> Tensor:
    """States of the real tokens of a batch in their places. (real tokens, d) -> (rows, tokens, d)."""
    mask = batch.inputs["attention_mask"].bool()
    placed = states.new_zeros((*mask.shape, states.shape[-1]))
    placed[mask] = states
    return placed


def _tensors(out: Any, mask: Tensor) -> list[Tensor]:
    """All tensors in what a trunk gives, those by token for the real tokens alone. Caches are left out."""
    if isinstance(out, Tensor):
        return [out[mask] if out.shape[:2] == mask.shape else out]
    inside = out.values() if isinstance(out, Mapping) else out if isinstance(out, tuple | list) else ()
    return [t for part in inside for t in _tensors(part, mask)]

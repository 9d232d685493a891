"""When memory runs out: how it is said, and what is done. First what changes no number, then smaller pieces."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from luthier.core import ResourceError
from luthier.data.batches import Batch
from luthier.runs.spec import RunSpec
from luthier.surgery import Tuned
from luthier.surgery.checkpointing import checkpoints_itself
from luthier.training.allocator import stop_keeping
from luthier.training.feed import Feed

__all__ = ["MemorySaver", "is_out_of_memory", "make_room"]

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def make_room() -> None:
    """Give back what nothing holds any more: a failed pass leaves cycles, and allocators keep their blocks."""
    gc.collect()
    stop_keeping()  # from now on memory counts for more than time
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class MemorySaver:
    """Lowers what a step needs, each time memory has run out.

    Args:
        in_one_piece: a step is one backward pass that moves what trains, so it cannot be cut.
        event: writes to the run's log.
        say: tells the user.
    """

    def __init__(
        self,
        spec: RunSpec,
        tuned: Tuned,
        feed: Feed,
        *,
        in_one_piece: bool,
        event: Callable[..., Any],
        say: Callable[[str], None],
    ) -> None:
        self._spec, self._tuned, self._feed = spec, tuned, feed
        self._in_one_piece, self._event, self._say = in_one_piece, event, say
        self.checkpointing = spec.gradient_checkpointing is True
        self._failed_update: int | None = None

    @property
    def can_checkpoint(self) -> bool:
        """Whether computing activations twice is allowed, possible, and not done yet."""
        wanted = self._spec.gradient_checkpointing == "auto" and not self.checkpointing
        return wanted and bool(getattr(self._tuned.model, "supports_gradient_checkpointing", False))

    def checkpoint_activations(self) -> None:
        """From now on compute activations twice."""
        self.checkpointing = True
        self._tuned.forward.checkpoint_activations()
        self.let_blocks_checkpoint()

    def let_blocks_checkpoint(self) -> None:
        """transformers checkpoints only layers that call themselves training; they compute in the mode of the model."""
        for module in self._tuned.model.modules():
            if checkpoints_itself(module):
                module.training = True

    def shrink(self, step: int, micro_batches: Sequence[Batch], error: BaseException) -> None:
        """A pass over `micro_batches` did not fit: less memory at the price of time.

        Raises:
            ResourceError: nothing is left to lower.
        """
        if not self.can_checkpoint:
            self._halve(step, micro_batches, error)
            return
        self.checkpoint_activations()
        widest = _widest(micro_batches)
        self._event("out_of_memory", step=step, tokens=widest, gradient_checkpointing=True)
        self._say(
            f"out of memory at {widest} tokens: activations are computed twice from here on (gradient checkpointing); "
            "that takes time and changes no number"
        )

    def _halve(self, step: int, micro_batches: Sequence[Batch], error: BaseException) -> None:
        widest = _widest(micro_batches)
        if self._in_one_piece:
            raise ResourceError(
                f"step {step}: {len(micro_batches[0].rows)} rows of {widest} tokens together do not fit in memory "
                f"({error}), and a step is one piece here: by optim.name = lomo, or by a strategy that compares its "
                "rows. Lower batch.size or max_length, or set gradient_checkpointing = true; the last good checkpoint, "
                "if there is one, stays."
            ) from error
        if all(len(b.rows) == 1 for b in micro_batches):
            raise ResourceError(
                f"step {step}: one row of {widest} tokens alone does not fit in memory ({error}). "
                "Lower max_length, set gradient_checkpointing = true, or take a smaller model."
            ) from error
        self._feed.budget = max(1, min(self._feed.budget, widest) // 2)
        self._event("out_of_memory", step=step, tokens=widest, new_budget=self._feed.budget)
        self._say(
            f"out of memory at {widest} tokens: micro-batches now hold {self._feed.budget}; the step keeps its rows"
        )

    def update_failed(self, step: int, error: BaseException, go_back: Callable[[], int]) -> None:
        """The update did not fit. Some numbers may have moved and some not: only a checkpoint is a state to go on from.

        Args:
            go_back: takes up the last checkpoint, and gives its step.

        Raises:
            ResourceError: the same update has failed before.
        """
        if self._failed_update == step:
            raise ResourceError(
                f"step {step + 1}: the update itself does not fit in memory ({error}). Train fewer numbers (another "
                "method, a smaller rank), or take a smaller model; the last good checkpoint stays."
            ) from error
        self._failed_update = step
        budget = self._feed.budget if self._in_one_piece else max(1, self._feed.budget // 2)
        back = go_back()
        self._feed.budget = min(self._feed.budget, budget)
        if self._in_one_piece and self.can_checkpoint:
            self.checkpoint_activations()
        make_room()
        self._event(
            "out_of_memory", step=step + 1, where="update", to_step=back, new_budget=self._feed.budget,
            gradient_checkpointing=self.checkpointing,
        )  # fmt: skip
        lighter = "activations are computed twice" if self.checkpointing else "the same is tried again"
        self._say(
            f"out of memory in the update of step {step + 1}: back to step {back}, "
            + (lighter if self._in_one_piece else f"micro-batches now hold {self._feed.budget} tokens")
        )


def _widest(micro_batches: Sequence[Batch]) -> int:
    return max(b.inputs["input_ids"].numel() for b in micro_batches)

"""What of the memory holds how much: counted, part by part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from luthier.surgery import Tuned
from luthier.training.optimiser import Optimiser

__all__ = ["Parts", "whole_memory"]


class Parts:
    """Counts the bytes of each part of one step: of the tensors that are there, not of what they should be.

        weights      the model's, with the values that a tuning gives back when it is taken off
        trained      the numbers that train
        gradients    the most they hold at once
        optimiser    its moments
        activations  what the forward pass keeps for the backward pass, logits apart
        logits       what of that is as wide as the vocabulary

    A storage counts whole and once, however many tensors look at it.
    """

    def __init__(self, tuned: Tuned, optimiser: Optimiser, device: torch.device) -> None:
        self._optimiser = optimiser
        trained = _storages(optimiser.named.values())
        originals = (u.kept for t in tuned.tunings.values() for u in t.unfrozen.values())
        held = _storages(chain(tuned.model.parameters(), tuned.model.buffers(), originals), device)
        head = tuned.model.get_output_embeddings()
        self._vocabulary = int(head.weight.shape[0]) if head is not None else -1
        self._weights = {k: n for k, n in held.items() if k not in trained}
        self._trained = trained
        self._kept: dict[int, tuple[int, bool]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Note every tensor that a forward pass inside keeps for its backward pass."""
        # Detached: a graph that kept its own output would keep itself alive.
        with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
            yield

    def _note(self, tensor: Tensor) -> Tensor:
        key, size = _storage(tensor)
        if key not in self._weights and key not in self._trained:
            wide = tensor.dim() > 0 and tensor.shape[-1] == self._vocabulary
            self._kept[key] = (size, wide or self._kept.get(key, (0, False))[1])
        return tensor.detach()

    def counted(self) -> dict[str, int]:
        """Bytes by part, after a pass inside `watching` whose gradients are still there."""
        found = {
            "weights": sum(self._weights.values()),
            "trained": sum(self._trained.values()),
            "gradients": self._optimiser.gradient_bytes(),
            "optimiser": self._optimiser.state_bytes(),
            "activations": sum(n for n, wide in self._kept.values() if not wide),
            "logits": sum(n for n, wide in self._kept.values() if wide),
        }
        return {part: n for part, n in found.items() if n or part != "logits"}


def whole_memory(parts: dict[str, int], program: int, peak: int | None) -> dict[str, int]:
    """Counted parts, the program before them, and what of the highest memory they do not explain.

    Parts are each counted at their own highest, and gradients grow while activations go: together they may come to more
    than was ever held. "other" is negative then; else it is workspace, packed weights, logits of the loss, evaluation.
    """
    if not parts or peak is None:
        return {}
    found = {**({"program": program} if program else {}), **parts}
    return {**found, "other": peak - sum(found.values())}


def _storage(tensor: Tensor) -> tuple[int, int]:
    """(address, bytes) of the memory that a tensor looks at; opaque ones have none of their own."""
    try:
        storage = tensor.untyped_storage()
    except NotImplementedError:
        return id(tensor), tensor.numel() * tensor.element_size()
    return storage.data_ptr(), storage.nbytes()


def _storages(tensors: Iterable[Tensor], device: torch.device | None = None) -> dict[int, int]:
    return dict(_storage(t) for t in tensors if device is None or t.device.type == device.type)

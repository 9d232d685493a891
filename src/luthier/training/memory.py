"""Running out of memory, in all the ways it is said, and what is left to do about it."""

from __future__ import annotations

import gc

import torch

__all__ = ["make_room", "out_of_memory"]

_WORDS = ("out of memory", "can't allocate memory", "cannot allocate memory", "defaultcpuallocator")


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def make_room() -> None:
    """Give back what nothing holds any more: a failed pass leaves cycles, and the GPU's allocator keeps its blocks."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

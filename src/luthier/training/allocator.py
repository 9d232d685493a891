"""Memory that a step frees and the next one wants again stays with the process in between.

By default the C library hands large blocks back to the system as soon as they are free, and the system clears every
page of them before it gives them out again. A training step frees all its activations at its end, so each step paid for
that anew: 2,400 page faults a step of minilm-l6 + LoRA, 220,000 a step of full fine-tuning of smollm2-135m, and 10 to
20 % of the time (docs/speed-log.md).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

__all__ = ["keeping_freed", "not_keeping", "stop_keeping"]

# Of mallopt(3). Its own limits after a large block has come and gone are these thresholds.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_NEVER = -1
_USUAL = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}


@cache
def _library() -> Any:
    """The C library, where it is glibc; None elsewhere, and there the system's own allocator is left alone."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if all(hasattr(library, n) for n in ("mallopt", "malloc_trim", "gnu_get_libc_version")) else None


@contextmanager
def keeping_freed(on: bool = True) -> Iterator[None]:
    """Within, freed memory is kept for the next step; afterwards what is free goes back to the system.

    Blocks of many sizes leave gaps between those that are kept, so the highest memory is higher by it.
    """
    library = _library() if on else None
    if library is None:
        yield
        return
    _keep(library)
    try:
        yield
    finally:
        stop_keeping()


@contextmanager
def not_keeping() -> Iterator[None]:
    """Within, the library's usual way also inside of `keeping_freed`; afterwards what is free goes back to the system.

    For work that comes once: what it freed would lie beside what the steps want, and leave gaps of other sizes.
    """
    library = _library()
    if library is None or not _State.keeps:
        yield
        return
    _usual(library)
    try:
        yield
    finally:
        library.malloc_trim(0)
        if _State.keeps:  # memory may have run out within
            _keep(library)


def stop_keeping() -> None:
    """Hand free memory to the system now, and from now on as the library does by itself."""
    _State.keeps = False
    library = _library()
    if library is not None:
        _usual(library)


class _State:
    keeps = False


def _keep(library: Any) -> None:
    _State.keeps = True
    library.mallopt(_MMAP_MAX, 0)  # large blocks too come from the heap, which outlives them
    library.mallopt(_TRIM_THRESHOLD, _NEVER)


def _usual(library: Any) -> None:
    for option, value in _USUAL.items():
        library.mallopt(option, value)
    library.malloc_trim(0)

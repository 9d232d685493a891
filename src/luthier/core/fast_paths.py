"""One switch for every fast path, so that a suspicion can be bisected in one run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fast", "plain"]

_plain = os.environ.get("LUTHIER_PLAIN", "") not in ("", "0")


def fast() -> bool:
    """True unless `plain()` is entered or the environment says `LUTHIER_PLAIN=1`. Read when a function is called."""
    return not _plain


@contextmanager
def plain(on: bool = True) -> Iterator[None]:
    """Compute by the plain definitions inside the block: no fused function, no table, no chunk.

    Results differ from the fast paths by rounding only; a keyed dropout keeps its masks, bit for bit. The switch is
    read in the forward pass, so the backward pass of what was computed inside may run outside.

    >>> with plain():
    ...     fast()
    False
    """
    global _plain
    before, _plain = _plain, on
    try:
        yield
    finally:
        _plain = before

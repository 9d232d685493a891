"""A process whose result nobody can read any more ends."""

import contextlib
import ctypes
import os
import signal

__all__ = ["end_with_the_parent"]


def end_with_the_parent() -> None:
    """When the parent dies, the kernel sends SIGTERM, and a run that it stops can be resumed. Only Linux does so."""
    parent = os.getppid()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it died a moment ago
        raise SystemExit(143)

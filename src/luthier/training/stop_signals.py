"""Signals: the first asks for a stop at the next safe place, the second leaves at once.

A safe place is wherever `check` is called: between micro-batches, between the batches of an evaluation, after a save.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopRequested", "StopSignals"]

_CAUGHT = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class StopRequested(BaseException):
    """A signal asked for a stop. Not an `Exception`: no handler of errors may take it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Catches signals inside a `with` block; `asked` is the first one's number, or None.

    Only the main thread may set handlers; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def check(self) -> None:
        """Raises: StopRequested, once a signal has come."""
        if self.asked is not None:
            raise StopRequested(self.asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            os._exit(128 + number)
        self.asked = number

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for name in _CAUGHT:
                number = getattr(signal, name, None)
                # A signal that the parent chose to ignore (nohup) stays ignored.
                if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

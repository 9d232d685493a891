"""Signals: the first asks the loop to stop at the next safe place, the second leaves at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

__all__ = ["StopSignals"]

_CAUGHT = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")


class StopSignals:
    """Catches signals inside a `with` block; `asked` is the first one's number, or None.

    Only the main thread may set handlers; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

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

"""Peak memory of this process, in bytes."""

import contextlib
import resource
import sys
from pathlib import Path

import psutil

__all__ = ["peak_bytes", "reset_peak", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """What the process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most it has held since it started, or since `reset_peak` where that is allowed."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes


def reset_peak() -> bool:
    """Let `peak_bytes` start again from what is held now. Returns whether the system allowed it."""
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")  # 5: reset the high-water mark of the resident set (Linux 4.0)
        return True
    return False

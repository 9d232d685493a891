"""One measurement in a process of its own: `python -m benchmarks._child JOB.json RESULT.json`.

A job names a function below `benchmarks` and its arguments. The process is fresh, so that its peak memory is its own.
"""

import contextlib
import importlib
import json
import os
import resource
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from benchmarks import _machine

__all__ = ["main", "run"]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Import the module, note what that costs, call the function, and note what that held."""
    start = time.perf_counter()
    module = importlib.import_module(f"benchmarks.{job['module']}")
    import torch

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    imported = time.perf_counter() - start
    baseline = _machine.held_bytes()
    with contextlib.suppress(OSError):
        _machine.reset_peak()
    used = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    found: dict[str, Any] = getattr(module, job["function"])(**job["arguments"])
    seconds = time.perf_counter() - start
    now = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **found,
        "seconds": seconds,
        "cpu_seconds": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
        "import_seconds": imported,
        "baseline_bytes": baseline,
        "peak_bytes": _peak(int(found.get("peak_bytes") or 0)),
        "threads": torch.get_num_threads(),
        "load_after": os.getloadavg()[0],
    }


def _peak(told: int) -> int:
    """The most that was held of the memory in which the work was done: a GPU's where one was used, else ours.

    Args:
        told: by the function itself. A run may reset the high-water mark; what it saw is then in its own result.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    return max(_machine.peak_bytes(), told)


def main(job: Path, result: Path) -> None:
    """Write the result of a job, or the error that ended it."""
    try:
        found = run(json.loads(job.read_text()))
    except Exception as error:  # the page says that a contestant failed, and why
        traceback.print_exc()
        found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
    result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Interleaved medians of one thread's CPU time, so that a busy machine bends ratios little."""

import statistics
import time
from collections.abc import Callable, Mapping

import torch

__all__ = ["pair"]


def pair(calls: Mapping[str, Callable[[], object]], repeats: int = 30) -> dict[str, float]:
    """Median CPU milliseconds of each call, run in turns on one thread.

    The calling thread's own CPU time is counted: what other processes do in between is left out, what they do to the
    shared caches is not.
    """
    torch.set_num_threads(1)
    for call in calls.values():
        call()
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            seconds[name].append(time.thread_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}

"""Memory that is freed inside a run stays with the process, and goes back to the system behind it."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from luthier.training import allocator

glibc = pytest.mark.skipif(allocator._library() is None, reason="another C library")


def faults(mebibytes: int = 48, times: int = 12) -> int:
    """Pages that the system had to clear for a block that comes and goes, after its first time."""
    torch.zeros(mebibytes << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.zeros(mebibytes << 18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_a_block_that_comes_again_is_not_cleared_by_the_system_again() -> None:
    pages, times = (48 << 20) // resource.getpagesize(), 12
    with allocator.keeping_freed():
        inside = faults(48, times)
    # Something small may come to lie in the freed block now and then, and the next one goes elsewhere.
    assert inside < pages * times / 4


@glibc
def test_what_is_free_goes_back_behind_it() -> None:
    with allocator.keeping_freed():
        torch.zeros(200 << 18)
        held = resident()
    assert resident() < held - (150 << 20)


def test_switched_off_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_library", lambda: pytest.fail("the allocator was touched"))
    with allocator.keeping_freed(False):
        pass


def test_elsewhere_than_on_glibc_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    allocator._library.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    try:
        assert allocator._library() is None
        with allocator.keeping_freed():
            pass
        allocator.give_back_freed()
    finally:
        allocator._library.cache_clear()

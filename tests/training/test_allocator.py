"""Memory that is freed inside a run stays with the process, and goes back to the system behind it."""

import resource
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from little import little_spec

from luthier.training import allocator
from luthier.workflow import run as running
from luthier.workflow import train

glibc = pytest.mark.skipif(allocator._library() is None, reason="another C library")


COUNT = """
import resource, torch
from luthier.training.allocator import keeping_freed
with keeping_freed():
    torch.zeros(48 << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.zeros(48 << 18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

RAN_OUT = """
import resource, torch
from luthier.training.allocator import keeping_freed
from luthier.training.out_of_memory import make_room
with keeping_freed():
    make_room()
    torch.zeros(48 << 18)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(48 << 18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(code: str) -> int:
    """What `code` prints in a process of its own: the heap of a thousand other tests has free pieces of any size."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@glibc
def test_a_block_that_comes_again_is_not_cleared_by_the_system_again() -> None:
    pages = (48 << 20) // resource.getpagesize()
    assert faults(COUNT) < 3 * pages  # of twelve times; something small may lie in the way once


@glibc
def test_what_is_free_goes_back_behind_it() -> None:
    with allocator.keeping_freed():
        torch.zeros(200 << 18)
        held = resident()
    assert resident() < held - (150 << 20)


@glibc
def test_what_a_look_at_the_rows_held_goes_back_before_the_first_step() -> None:
    with allocator.keeping_freed():
        before = resident()
        with allocator.not_keeping():
            torch.zeros(200 << 18)
            assert resident() < before + (20 << 20), "a large block goes back at once"
        torch.zeros(200 << 18)
        assert resident() > before + (150 << 20), "and what comes after it is kept as before"
    with allocator.not_keeping():
        pass
    assert not allocator._State.keeps


@glibc
def test_where_memory_ran_out_in_a_look_nothing_is_kept_after_it() -> None:
    with allocator.keeping_freed():
        with allocator.not_keeping():
            allocator.stop_keeping()
        before = resident()
        torch.zeros(200 << 18)
        assert resident() < before + (20 << 20)


def test_a_run_that_looks_at_rows_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def not_keeping() -> Any:
        told.append("look")
        return nullcontext()

    monkeypatch.setattr(running, "not_keeping", not_keeping)
    train(little_spec(tmp_path, method="lora", steps=1, out=str(tmp_path / "lora")))
    assert told == []
    train(little_spec(tmp_path, method="fish_mask", steps=1, out=str(tmp_path / "fish")))
    assert told == ["look"]


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
        allocator.stop_keeping()
    finally:
        allocator._library.cache_clear()


@glibc
def test_when_memory_ran_out_nothing_is_kept_any_more() -> None:
    pages = (48 << 20) // resource.getpagesize()
    assert faults(RAN_OUT) >= pages // 2  # pages of two sizes may be counted as one


@pytest.mark.parametrize(("asked", "keeps"), [(True, False), (False, True), ("auto", True)])
def test_a_run_that_computes_activations_twice_keeps_nothing(
    asked: Any, keeps: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[bool] = []

    def keeping(on: bool) -> Any:
        told.append(on)
        return nullcontext()

    monkeypatch.setattr(running, "keeping_freed", keeping)
    train(little_spec(tmp_path, steps=1, gradient_checkpointing=asked, out=str(tmp_path / "run")))
    assert told == [keeps]

"""Faults for tests: one at each numbered operation in turn, and random damage to files at rest."""

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from luthier.core import LuthierError
from luthier.runs.durable import count_ops, install, uninstall
from luthier.runs.fault import Fault, Operation, PowerLoss, SimulatedDeath, parse_fault

__all__ = [
    "Damage",
    "Fault",
    "Operation",
    "PowerLoss",
    "SimulatedDeath",
    "count_ops",
    "damage",
    "every_operation",
    "installed",
    "parse_fault",
]

T = TypeVar("T")


@contextlib.contextmanager
def installed(fault: str | Fault) -> Iterator[Fault]:
    """Let a fault, such as "save:7:enospc", be armed inside the block."""
    armed = parse_fault(fault) if isinstance(fault, str) else fault
    install(armed)
    try:
        yield armed
    finally:
        uninstall(armed)


def every_operation(
    scope: str, kind: str, prepare: Callable[[], T], work: Callable[[T], object]
) -> Iterator[tuple[int, T, LuthierError | None]]:
    """Do `work(prepare())` once for each operation in `scope`, with a fault of `kind` at that one.

    For faults that the process outlives (a full disk, an error); for those that kill it see `runs.forkserver`.

    Yields:
        the operation's number, what was prepared, and the error of ours that `work` ended with (None: it succeeded).
    """
    k = 0
    while True:
        k += 1
        prepared, ended = prepare(), None
        with installed(Fault(scope, k, kind, real=False)) as fault:
            try:
                work(prepared)
            except LuthierError as error:
                ended = error
        if not fault.fired:
            return
        yield k, prepared, ended


@dataclass(frozen=True)
class Damage:
    """One piece of damage to one file, as done."""

    kind: str
    path: Path
    detail: str


def damage(files: list[Path], random_source: random.Random, kinds: tuple[str, ...] = ("flip",)) -> Damage:
    """Damage one of `files`, chosen at random, in place.

    Args:
        kinds: among "flip" (one bit), "byte" (one byte becomes another), "cut" (the file ends earlier), "grow" (bytes
            are added), "zero" (a stretch becomes zeros), "remove" (the file is gone).
    """
    path = random_source.choice([f for f in files if f.stat().st_size])
    content = bytearray(path.read_bytes())
    kind = random_source.choice(kinds)
    at = random_source.randrange(len(content))
    if kind == "flip":
        bit = random_source.randrange(8)
        content[at] ^= 1 << bit
        detail = f"bit {bit} of byte {at}"
    elif kind == "byte":
        content[at] ^= random_source.randrange(1, 256)
        detail = f"byte {at}"
    elif kind == "cut":
        del content[at:]
        detail = f"cut to {at} bytes"
    elif kind == "grow":
        content += random_source.randbytes(1 + at % 64)
        detail = f"{1 + at % 64} bytes added"
    elif kind == "zero":
        stretch = range(at, min(len(content), at + 512))
        if not any(content[i] for i in stretch):
            content[at] = 1  # it was zeros already: damage it the other way
        else:
            for i in stretch:
                content[i] = 0
        detail = f"{len(stretch)} bytes from {at}"
    else:
        path.unlink()
        return Damage(kind, path, "removed")
    path.write_bytes(bytes(content))
    return Damage(kind, path, detail)

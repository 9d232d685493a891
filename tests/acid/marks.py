"""The acid tests that each method and strategy owes, held against the tests that are marked with them.

The files beside this one list what is owed, in order, by the names of the catalogue: what a test of it has to show.
`everywhere` names a test that runs for every method; `missing` says why a test is not there. Strategies that are not
built are not listed. A test says what it shows: @pytest.mark.acid("compacter", 1, 2).

`PYTHONPATH=src:tests python tests/acid/marks.py` prints the count and what is missing; `make test` prints the count.
"""

import ast
import tomllib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from marked import TESTS, all_marked

from luthier.asking import WAYS
from luthier.cli._main import verbs
from luthier.cli._parts_of_runs import PARTS_OF_RUNS
from luthier.surgery import METHODS
from luthier.training import STRATEGIES

__all__ = ["Owed", "counted", "functions_of", "listed", "registered"]


@dataclass(frozen=True)
class Owed:
    """What one method or strategy owes. Numbers count from 1."""

    what: tuple[str, ...]
    everywhere: dict[int, str] = field(default_factory=dict)
    missing: dict[int, str] = field(default_factory=dict)

    def numbers(self) -> range:
        return range(1, len(self.what) + 1)


@cache
def listed() -> dict[str, Owed]:
    """Name -> what it owes."""
    found: dict[str, Owed] = {}
    for path in sorted(Path(__file__).parent.glob("*.toml")):
        for name, entry in tomllib.loads(path.read_text(encoding="utf-8")).items():
            assert name not in found, f"{path.name}: {name} is listed twice"
            numbered = ({int(k): v for k, v in entry.get(kind, {}).items()} for kind in ("everywhere", "missing"))
            found[name] = Owed(tuple(entry["owed"]), *numbered)
    return found


def functions_of(name: str) -> set[str]:
    """The tests of one file, as file::test."""
    body = ast.parse((TESTS / name).read_text(encoding="utf-8")).body
    return {f"{name}::{node.name}" for node in body if isinstance(node, ast.FunctionDef)}


def registered() -> set[str]:
    """What is built. Some of what the catalogue counts among the strategies is a verb, such as `safety-audit`."""
    return {*METHODS.ours(), *STRATEGIES.ours(), *WAYS.ours(), *PARTS_OF_RUNS, *(v.replace("-", "_") for v in verbs())}


def counted() -> str:
    """How many are owed by what is built, how many are there, and how many wait for what is not built."""
    built, there = registered(), all_marked("acid")
    owed = [(name, n) for name, entry in listed().items() if name in built for n in entry.numbers()]
    present = sum((name, n) in there or n in listed()[name].everywhere for name, n in owed)
    waiting = {name: len(entry.what) for name, entry in listed().items() if name not in built}
    return (
        f"acid tests: owed {len(owed)}, present {present}, missing {len(owed) - present}; "
        f"{sum(waiting.values())} more are owed by {len(waiting)} methods that are not built"
    )


if __name__ == "__main__":
    for method, entry in listed().items():
        for n, why in entry.missing.items():
            print(f"{method} {n}: {entry.what[n - 1]}: {why}")
    print(counted())

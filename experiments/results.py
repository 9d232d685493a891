"""The results of an experiment: one line each, appended as it comes, and none made twice."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan_grid import part_of
from luthier.core import Interrupted, LuthierError

__all__ = ["attempted", "kept", "known", "named", "once", "scored", "tried", "words_of"]


def words_of(
    experiment: str, what: str, results: Path, doc: str | None, get: Callable[[str], object]
) -> argparse.ArgumentParser:
    """The words of the command line of a table with a row for each of `what`, such as a method.

    Args:
        get: gives what has such a name. A name that is none is no row of the table: what it says is the answer.
    """
    words = argparse.ArgumentParser(prog=f"python -m experiments.{experiment}", description=doc)
    words.add_argument("--only", action="append", type=partial(named, get), help=f"a {what}; may be repeated")
    words.add_argument("--seeds", type=int, default=3, help=f"seeds of each {what}")
    words.add_argument("--results", type=Path, default=results, help="another file: no page is written from it")
    words.add_argument("--page", action="store_true", help="only write the page from what is here")
    words.add_argument(
        "--part", type=part_of, default=(1, 1), metavar="I/N",
        help="of N equal parts the I-th, for as many of these commands beside each other as there are cores",
    )  # fmt: skip
    return words


def named(get: Callable[[str], object], name: str) -> str:
    """A name of the command line, once `get` has found what is called so."""
    try:
        get(name)
    except LuthierError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def known(results: Path) -> list[dict[str, Any]]:
    """The results that are there."""
    return [json.loads(line) for line in results.read_text("utf-8").splitlines()] if results.exists() else []


def once(results: Path, which: dict[str, Any], make: Callable[[], dict[str, Any]]) -> None:
    """Append `which` with what `make` gives and the seconds that took, unless a result of `which` is there."""
    if any(all(row[k] == v for k, v in which.items()) for row in known(results)):
        return
    begun = time.monotonic()
    line = json.dumps({**which, **make(), "seconds": round(time.monotonic() - begun, 1)})
    with results.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line, flush=True)


def kept(folder: Path, make: Callable[[str], object]) -> str:
    """A folder that `make` fills once. Two processes may make it at a time: the first one's stays."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as home:
            make(f"{home}/run")
            try:
                (Path(home) / "run").rename(folder)
            except OSError:
                if not folder.exists():  # else another process was first
                    raise
    return str(folder)


def attempted(run: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """What `run` gives in a folder that is there for it alone; of one that stops, why.

    One that breaks must not keep the others from their turn, and the page shows it. Whoever interrupts means all.
    """
    try:
        with tempfile.TemporaryDirectory() as home:
            return run(f"{home}/run")
    except Interrupted:
        raise
    except Exception as error:
        return {"refused": f"{type(error).__name__}: {error}"}


def tried(run: Callable[[str], tuple[Sequence[bool], dict[str, Any]]]) -> dict[str, Any]:
    """The same of a run whose answers are right or wrong: scored."""

    def made(home: str) -> dict[str, Any]:
        right, facts = run(home)
        return scored(right) | facts

    return attempted(made)


def scored(right: Sequence[bool]) -> dict[str, Any]:
    """The share of the rows that were right, and how many there are."""
    return {"accuracy": round(statistics.fmean(right), 4), "rows": len(right)}
